"""Decoder blocks computed by a few hand-written functions over a Hugging Face model's own parameters.

    decoder = read_decoder(model)                # what the blocks are made of, or the reason why not
    hidden = decoder_hidden(decoder, row)        # (S, D), the hidden states that predict the targets

A composite block keeps every intermediate for its backward pass; here three functions a block keep only what cannot be
recomputed by an elementwise pass (block input, q·k·v, attention output, the residual between, the pre-activation of the
MLP), and matrix products run over real tokens only. The same numbers as the model's own modules, to rounding: a model
is accepted by trial (`packed.enable_packing`), not by name.
"""

from tunelab.models.fused.architecture import Decoder, read_decoder
from tunelab.models.fused.forward import decoder_hidden

__all__ = ["Decoder", "decoder_hidden", "read_decoder"]
