"""Continuing prompts over a decoder's own parameters: packed prefill, then one token a row and step on a static cache.

    decoding = Decoding(model, dtype, num_positions, max_new_tokens)
    decoding.start(prompts)
    logits = decoding.next_logits()            # (B, V), of the rows that still go on
    decoding.advance(tokens, going)            # append a token to each; keep the rows `going`

Prompts lie end to end while they are read, so nothing is padded. In the cache a row's prompt begins in column 0, and
the n-th new token of every row stands in the same column, behind the longest prompt; a mask hides the gap between. So a
step writes one column and reads a prefix, whatever the lengths.

On a CPU a step is bound by reading the weights: they are used where they lie, and rows that end leave the batch. On
CUDA it is bound by launching kernels: shapes stay what they are, and the step is captured once as a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunelab.models.fused.architecture import Block, Decoder, Projection, read_decoder
from tunelab.models.fused.elementwise import activate, normalise
from tunelab.models.fused.linear import matrix, row_lengths, summed_bias
from tunelab.models.quantised import is_packed
from tunelab.models.segments import plan_parts, segment_attention
from tunelab.models.virtual_rows import VirtualTokens
from tunelab.products import linear
from tunelab.types import Segment

PREFILL_TOKENS = 4096
"""Prompts are read together up to this many tokens: enough to fill a matrix product, and it bounds the activations."""

FEW_ROWS = 64
"""Up to which a product puts the weights first: see `_weights_first`."""

Rotary = tuple[Tensor, Tensor] | None
"""cos and signed sin of each token, (T, 1, 2, head_size/2): see `_rotated`."""


def why_not_decodable(model: PreTrainedModel, num_positions: int) -> str | None:
    """What stands in the way of `Decoding` in a model whose fused blocks compute the same as its own; None: nothing."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < num_positions:
        return f"its attention slides over {window} tokens"
    rotary = getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", "default")
    if rotary in ("dynamic", "longrope"):
        return f"its rotary positions ({rotary}) change with the length"
    if type(model.get_output_embeddings()) is not nn.Linear:
        return f"its output head is a {type(model.get_output_embeddings()).__name__}"
    return None


class Decoding:
    """The forward passes of one batch after another. Call it in inference mode, without autocast.

    dtype: of products and cache. num_positions: of the longest prompt with its answer. static: constant shapes, as a
    CUDA graph needs them; by default on CUDA alone. virtual: tokens before every prompt; their keys and values fill the
    first columns of the cache, and positions count them.
    """

    has_cache = True
    unpadded = False

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype,
        num_positions: int,
        max_new_tokens: int,
        static: bool | None = None,
        virtual: VirtualTokens | None = None,
    ) -> None:
        decoder, head = read_decoder(model), model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        self.decoder, self.dtype, self.max_new_tokens = decoder, dtype, max_new_tokens
        self.device = decoder.tokens.device
        self.layers = [_Layer(block, dtype) for block in decoder.blocks]
        self.head = _Product(Projection(head.weight, head.bias, input_first=False), dtype)
        self.ahead = 0 if virtual is None else virtual.count
        self.table = _rotary_table(decoder, self.ahead + num_positions)
        self.before = None if virtual is None else self._keys_values(virtual)
        self.static = self.device.type == "cuda" if static is None else static
        self.prompts: Sequence[Sequence[int]] = ()
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        """A new batch, and an empty cache for it."""
        block = self.decoder.blocks[0]
        num_rows, width = len(prompts), max(len(prompt) for prompt in prompts)
        self.prompts, self.graph = prompts, None
        width += self.ahead
        self.num_columns, self.used = width + self.max_new_tokens, width
        shape = (len(self.layers), 2, num_rows, block.num_kv_heads, self.num_columns, block.head_size)
        self.cache = torch.empty(shape, dtype=self.dtype, device=self.device)
        # What no row has written is masked, but zero times what lies in fresh memory may be NaN.
        (self.cache if self.static else self.cache[..., :width, :]).zero_()
        if self.before is not None:
            self.cache[..., : self.ahead, :] = self.before.transpose(2, 3)[:, :, None]
        mask = torch.full((num_rows, block.num_kv_heads, 1, self.num_columns), -torch.inf, dtype=self.dtype)
        for row, prompt in enumerate(prompts):
            mask[row, ..., : self.ahead + len(prompt)] = 0
        self.mask = mask.to(self.device)
        # Of the last token that was read; `advance` moves them on to the next.
        self.column = torch.tensor([width - 1], device=self.device)
        self.positions = torch.tensor([self.ahead + len(prompt) - 1 for prompt in prompts], device=self.device)
        self.tokens = torch.zeros_like(self.positions)
        self.live = torch.arange(num_rows, device=self.device)

    def next_logits(self) -> Tensor:
        """(B, V) float32 logits of the next token of every row that goes on."""
        if self.prompts:
            prompts, self.prompts = self.prompts, ()
            return torch.cat([self._prefill(prompts, rows) for rows in _groups(prompts)]).float()
        if not self.static:
            return self._step(self.used).float()
        logits = self._replay() if self.device.type == "cuda" else self._step(self.num_columns)
        return logits[self.live].float()

    def advance(self, tokens: Tensor, going: list[int]) -> None:
        """Append `tokens` (B,) and keep the rows `going` (ascending), if any."""
        if not going:
            return
        kept = torch.tensor(going, device=self.device)
        tokens = tokens.to(self.device)[kept]
        if self.static:
            # Rows that ended are computed along and not looked at.
            self.live = self.live[kept]
            self.tokens[self.live] = tokens
        else:
            self._close_ranks(going)
            self.tokens, self.positions = tokens, self.positions[kept]
        self.used += 1
        self.column += 1
        self.positions += 1

    def _close_ranks(self, going: list[int]) -> None:
        """Move the rows `going` to the front, in place: each goes to a row before it, which is not needed any more."""
        for to, row in enumerate(going):
            if to != row:
                self.cache[:, :, to, :, : self.used] = self.cache[:, :, row, :, : self.used]
                self.mask[to] = self.mask[row]

    def _prefill(self, prompts: Sequence[Sequence[int]], rows: range) -> Tensor:
        """Read the prompts of `rows` end to end into the cache; (rows, V) logits of their last positions."""
        ids = [token for row in rows for token in prompts[row]]
        owners = torch.tensor([row for row in rows for _ in prompts[row]], device=self.device)
        positions = self.ahead + torch.tensor([i for row in rows for i in range(len(prompts[row]))], device=self.device)
        stops = [*accumulate(len(prompts[row]) for row in rows)]
        segments = tuple(Segment(start, stop) for start, stop in zip([0, *stops], stops, strict=False))
        last = torch.tensor(stops, device=self.device) - 1
        x = self._embed(torch.tensor(ids, device=self.device), positions)
        rotary = _at(self.table, positions)
        for i, layer in enumerate(self.layers):
            query, key, value = layer.read(x, rotary)
            for kept, new in zip(self.cache[i], (key, value), strict=True):
                kept.transpose(1, 2)[owners, positions] = new
            ranges = None
            if layer is self.layers[-1]:
                x, ranges = x[last], tuple((stop - 1, stop) for stop in stops)
            x = layer.write(x, self._attend_prompts(i, (query, key, value), segments, ranges))
        return self._project(x)

    def _attend_prompts(
        self,
        layer: int,
        heads: tuple[Tensor, Tensor, Tensor],
        segments: tuple[Segment, ...],
        ranges: tuple[tuple[int, int], ...] | None,
    ) -> Tensor:
        """(Q, H·K) of queries, keys and values (T, ·, K) of prompts end to end, the virtual ones before each."""
        ranges = ranges or tuple((segment.start, segment.stop) for segment in segments)
        if self.before is not None:
            # The virtual rows lie once before all prompts; their queries are asked for by nobody.
            query, key, value = heads
            keys, values = self.before[layer]
            nobody = query.new_zeros(self.ahead, *query.shape[1:])
            heads = torch.cat((nobody, query)), torch.cat((keys, key)), torch.cat((values, value))
            segments = tuple(Segment(s.start + self.ahead, s.stop + self.ahead, 0, self.ahead) for s in segments)
            ranges = tuple((start + self.ahead, stop + self.ahead) for start, stop in ranges)
        return segment_attention(*heads, plan_parts(segments, ranges), self.layers[layer].block.scaling)

    def _keys_values(self, virtual: VirtualTokens) -> Tensor:
        """(L, 2, V, H_kv, K) of the virtual tokens: given, or computed from their embeddings, which see themselves
        alone and so the same before every prompt.
        """
        if virtual.embeddings is None:
            assert virtual.keys_values is not None
            return virtual.keys_values.to(self.dtype)
        x = virtual.embeddings.to(self.decoder.tokens.dtype)
        positions = torch.arange(len(x), device=self.device)
        x = self._placed(x.clone(), positions)
        rotary, found = _at(self.table, positions), []
        parts = plan_parts((Segment(0, len(x)),))
        for layer in self.layers:
            query, key, value = layer.read(x, rotary)
            found.append(torch.stack((key, value)))
            x = layer.write(x, segment_attention(query, key, value, parts, layer.block.scaling))
        return torch.stack(found)

    def _step(self, num_columns: int) -> Tensor:
        """(B, V) logits after one token a row; attention over the first `num_columns` of the cache.

        Reads tensors that stay in place (under `static`) and can be repeated: what a CUDA graph asks for.
        """
        num_rows = len(self.tokens)
        x = self._embed(self.tokens, self.positions)
        rotary = _at(self.table, self.positions)
        self.mask.index_fill_(-1, self.column, 0)
        mask = self.mask[:num_rows].flatten(0, 1)[..., :num_columns]
        for layer, cache in zip(self.layers, self.cache[:, :, :num_rows], strict=True):
            query, *new = layer.read(x, rotary)
            for kept, one in zip(cache, new, strict=True):
                kept.index_copy_(2, self.column, one[:, :, None])
            keys, values = (kept.flatten(0, 1)[:, :num_columns] for kept in cache)
            x = layer.write(x, _attend(query, keys, values, mask, layer.block.scaling))
        return self._project(x)

    def _replay(self) -> Tensor:
        """`_step` as a CUDA graph, captured at the first step of a batch."""
        if self.graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # libraries set themselves up outside of the capture
                self._step(self.num_columns)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step(self.num_columns)
        self.graph.replay()
        return self.logits

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(T, D)"""
        return self._placed(F.embedding(ids, self.decoder.tokens), positions)

    def _placed(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` with learned positions added in place."""
        learned = self.decoder.positions
        return x if learned is None else x.add_(F.embedding(positions, learned))

    def _project(self, x: Tensor) -> Tensor:
        return self.head(normalise(x, self.decoder.final_norm).to(self.dtype))


class _Product:
    """A projection in the precision of the products; its weights are the model's own where they have it already.

    A packed weight stays packed and is dequantised at every call. DoRA's factors are computed once: nothing learns.
    """

    def __init__(self, projection: Projection, dtype: torch.dtype) -> None:
        low = projection.adapter
        self.projection, self.dtype = projection, dtype
        self.kept_weight = None if is_packed(projection.weight) else matrix(projection, dtype).T
        self.bias = summed_bias(projection, dtype)
        self.low = None if low is None else (low.down.to(dtype), low.up.T.to(dtype), low.scaling)
        self.ratio: Tensor | None = None
        if low is not None and low.magnitude is not None:
            self.ratio = (low.magnitude / row_lengths(projection)).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(T, in) → (T, out), which may lie column by column."""
        weight = matrix(self.projection, self.dtype).T if self.kept_weight is None else self.kept_weight
        bias = self.bias if self.ratio is None else None
        if _weights_first(x) and weight.is_contiguous():
            out = linear(weight, x).T
            out = out if bias is None else out.add_(bias)
        else:
            out = linear(x, weight, bias)
        if self.low is not None:
            down, up, scaling = self.low
            out.addmm_(linear(x, down), up, alpha=scaling)
        if self.ratio is not None:
            out.mul_(self.ratio)
            out = out if self.bias is None else out.add_(self.bias)
        return out


def _weights_first(x: Tensor) -> bool:
    """Whether to compute (W·xᵀ)ᵀ instead of x·Wᵀ: on a CPU the first operand is streamed and the second rearranged, and
    with few rows the weights are the larger. At 8 rows of SmolLM2 and x column by column, a fifth of a step.
    """
    return x.device.type == "cpu" and x.dtype == torch.float32 and len(x) <= FEW_ROWS


class _Layer:
    """The two halves of a block around its attention."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.block, self.dtype = block, dtype
        self.inputs = [_Product(projection, dtype) for projection in block.inputs]
        self.output = _Product(block.output, dtype)
        self.up = [_Product(projection, dtype) for projection in block.up]
        self.down = _Product(block.down, dtype)

    def read(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) → queries (T, H, K), keys and values (T, H_kv, K)."""
        block = self.block
        hidden = normalise(x, block.input_norm).to(self.dtype)
        found = [product(hidden).unflatten(1, (-1, block.head_size)) for product in self.inputs]
        if len(found) == 1:
            found = list(found[0].split((block.num_heads, block.num_kv_heads, block.num_kv_heads), dim=1))
        query, key, value = found
        return _rotated(query, rotary), _rotated(key, rotary), value

    def write(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's result (T, D) from its input x, which is overwritten, and its attention's output (T, H·K)."""
        x.add_(self.output(attended))
        hidden = normalise(x, self.block.mlp_norm).to(self.dtype)
        if self.block.activation == "swiglu":
            gate, up = (product(hidden) for product in self.up)
            active = F.silu(gate, inplace=True).mul_(up)
        else:
            active = activate(self.up[0](hidden), self.block.activation)
        return x.add_(self.down(active))


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """One query a row and head. query: (B, H, K); keys, values: (B·H_kv, N, K); mask: (B·H_kv, 1, N), added to the
    scores. Returns (B, H·K).

    As batched products: on a CPU they are as fast as the flash kernel, and the heads of a group share a reading.
    """
    grouped = query.reshape(len(keys), -1, query.shape[-1])
    scores = torch.baddbmm(mask.expand(-1, grouped.shape[1], -1), grouped, keys.transpose(1, 2), alpha=scaling)
    return torch.bmm(torch.softmax(scores, dim=-1), values).view(len(query), -1)


def _rotary_table(decoder: Decoder, num_positions: int) -> Rotary:
    """cos | cos and −sin | sin of every position, (N, 1, 2, K/2): Su et al. 2021, eq. 34, a head's halves paired."""
    if decoder.rotary is None:
        return None
    positions = torch.arange(num_positions, device=decoder.tokens.device)
    cos, sin = decoder.rotary(decoder.tokens[:1], position_ids=positions[None])
    half = cos.shape[-1] // 2
    cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]
    return torch.stack((cos, cos), dim=2), torch.stack((-sin, sin), dim=2)


def _at(table: Rotary, positions: Tensor) -> Rotary:
    return None if table is None else (table[0][positions], table[1][positions])


def _rotated(heads: Tensor, rotary: Rotary) -> Tensor:
    """(T, H, K) at their positions: x·cos + (x₂ | x₁)·(−sin | sin)."""
    if rotary is None:
        return heads
    cos, sin = rotary
    halves = heads.unflatten(2, (2, -1))
    return torch.addcmul(halves * cos, halves.flip(2), sin).flatten(2).to(heads.dtype)


def _groups(prompts: Sequence[Sequence[int]]) -> Iterator[range]:
    """Neighbouring rows of at most `PREFILL_TOKENS` together, at least one each."""
    start, total = 0, 0
    for row, prompt in enumerate(prompts):
        if row > start and total + len(prompt) > PREFILL_TOKENS:
            yield range(start, row)
            start, total = row, 0
        total += len(prompt)
    yield range(start, len(prompts))
