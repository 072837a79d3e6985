"""Continuing prompts: batched, cached, streamed, and the same for a prompt whatever else is in its batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tunelab.errors import ConfigError
from tunelab.models.adapters.virtual import virtual_tokens
from tunelab.models.attention import plain_attention
from tunelab.models.fused.decoding import Decoding, why_not_decodable
from tunelab.models.loaded import LoadedModel
from tunelab.models.padded import virtual_inputs
from tunelab.models.sampling import (
    GenerationSettings,
    draw,
    filter_logits,
    penalize_repetition,
    row_generator,
)
from tunelab.models.virtual_rows import VirtualTokens

__all__ = ["Generation", "GenerationSettings", "generate"]

FinishReason = Literal["eos", "stop", "length"]
OnText = Callable[[int, str], None]

CONTEXT_TOKENS = 8
"""Prompt tokens decoded in front of an answer: what a token looks like (a leading space) can depend on them."""


@dataclass(frozen=True)
class Generation:
    """What the model answered.

    `ids`: every generated token, the end-of-sequence token included. `text`: without special tokens, cut before the
    stop string.
    """

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


def generate(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    on_text: OnText | None = None,
) -> list[Generation]:
    """Continue every prompt (token ids) until end of sequence, a stop string or `max_new_tokens`.

    `on_text(index of the prompt, piece)` is called as text appears, with whole characters; the pieces of a prompt
    join to its `text`. Dropout is off meanwhile and the model's mode restored; no global random state is touched.
    Raises ConfigError for an empty prompt, or one that leaves no room in the model's context.
    """
    virtual = _virtual(loaded)
    _check_prompts(loaded, prompts, settings)
    if not prompts:
        return []
    eos = _eos_ids(loaded)
    rows = [_Row(i, tuple(ids), settings, loaded.tokenizer, eos, on_text) for i, ids in enumerate(prompts)]
    # Prompts of about one length share a batch: a short one would wait for, and pay for, the columns of a long one.
    by_length = sorted(rows, key=lambda row: len(row.prompt))
    with torch.inference_mode(), _steps(loaded, len(by_length[-1].prompt), settings, virtual) as step:
        for batch in _batches(by_length, settings.batch_size if step.has_cache else 1, step.unpadded):
            _generate_batch(step, batch, settings)
    return [row.result() for row in rows]


def _batches(rows: list[_Row], size: int, unpadded: bool) -> Iterator[list[_Row]]:
    """Neighbours, at most `size` together; `unpadded`: of one length."""
    batch: list[_Row] = []
    for row in rows:
        if batch and (len(batch) == size or (unpadded and len(row.prompt) != len(batch[0].prompt))):
            yield batch
            batch = []
        batch.append(row)
    yield batch


@contextmanager
def _steps(
    loaded: LoadedModel, longest: int, settings: GenerationSettings, virtual: VirtualTokens | None
) -> Iterator[_Step | Decoding]:
    """The forward passes for this model: over its blocks' parameters where the engine found that they compute the same
    (`loaded.shortcuts`), else through its own modules.
    """
    model, num_positions = loaded.model, longest + settings.max_new_tokens
    ahead = 0 if virtual is None else virtual.count
    if loaded.shortcuts.fused_blocks and why_not_decodable(model, ahead + num_positions) is None:
        dtype = loaded.precision.compute_dtype or model.dtype
        yield Decoding(model, dtype, num_positions, settings.max_new_tokens, virtual=virtual)
        return
    with _evaluating(model), plain_attention(model), loaded.precision.autocast():
        yield _Step(model, loaded.device, virtual)


def _generate_batch(step: _Step | Decoding, rows: list[_Row], settings: GenerationSettings) -> None:
    """Run `rows` to their ends. A row that ends leaves the batch."""
    step.start([row.prompt for row in rows])
    seen = None
    while rows:
        logits = step.next_logits()
        if settings.repetition_penalty != 1.0:
            if seen is None:
                seen = _seen_mask(rows, logits)
            logits = penalize_repetition(logits, seen, settings.repetition_penalty)
        if settings.temperature == 0:
            tokens = logits.argmax(dim=-1).cpu()
        else:
            # On the CPU: cumulative sums are not deterministic on CUDA, and the draws are then the same everywhere.
            filtered = filter_logits(logits.cpu(), settings.temperature, settings.top_k, settings.top_p)
            tokens = draw(filtered, [row.generator for row in rows])
        going = [i for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)) if row.add(token)]
        if seen is not None:
            seen = seen.scatter(1, tokens[:, None].to(seen.device), True)[going]
        rows = [rows[i] for i in going]
        step.advance(tokens, going)


def _seen_mask(rows: list[_Row], logits: Tensor) -> Tensor:
    """(B, V) bool: the tokens of each prompt, its own only (padding is not seen)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for i, row in enumerate(rows):
        seen[i, torch.tensor(row.prompt, device=logits.device)] = True
    return seen


class _Step:
    """The forward passes of one batch: left-padded prompts first, then one token a row on the cache.

    A model without a key-value cache (state-space models) is given the whole sequence each time, one row at once:
    recurrent layers would read padding. Behind `virtual` tokens there is none: a sliding window or a distance would
    count it.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, virtual: VirtualTokens | None = None) -> None:
        self.model, self.device, self.virtual = model, device, virtual
        self.unpadded = virtual is not None
        self.accepts = set(inspect.signature(model.forward).parameters)
        self.has_cache = "past_key_values" in self.accepts

    def start(self, prompts: Sequence[Sequence[int]]) -> None:
        width = max(len(prompt) for prompt in prompts)
        # The padding's id is never attended to; 0 is in every vocabulary.
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        self.input_ids, self.mask = ids.to(self.device), mask.to(self.device)
        self.cache = DynamicCache(config=self.model.config) if self.has_cache else None
        if self.virtual is None:
            return
        if self.virtual.keys_values is not None:
            self.cache = virtual_inputs(self.model, self.virtual, len(prompts), None)["past_key_values"]
        self.mask = torch.cat((self.mask.new_ones(len(prompts), self.virtual.count), self.mask), dim=1)

    def next_logits(self) -> Tensor:
        """(B, V) float32 logits of the next token of every row."""
        arguments: dict[str, Any] = {"input_ids": self.input_ids}
        if self._reads_embeddings():
            assert self.virtual is not None
            tokens = self.model.get_input_embeddings()(arguments.pop("input_ids"))
            arguments = virtual_inputs(self.model, self.virtual, len(tokens), tokens)
        new = next(iter(arguments.values())).shape[1]
        if self.has_cache:
            positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -new:]
            arguments |= {"attention_mask": self.mask, "past_key_values": self.cache, "use_cache": True}
            arguments |= {"position_ids": positions, "logits_to_keep": 1}
        kept = {name: value for name, value in arguments.items() if name in self.accepts}
        logits: Tensor = self.model(**kept).logits[:, -1]
        return logits.float()

    def _reads_embeddings(self) -> bool:
        """Whether virtual embeddings are still to be read: once, or with every token where nothing is kept."""
        if self.virtual is None or self.virtual.embeddings is None:
            return False
        return self.cache is None or self.cache.get_seq_length() == 0

    def advance(self, tokens: Tensor, going: list[int]) -> None:
        """Append `tokens` (B,) and keep the rows `going`."""
        if not going:
            return
        rows = torch.tensor(going, device=self.device)
        column = tokens.to(self.device)[rows, None]
        if self.cache is None:
            self.input_ids = torch.cat((self.input_ids[rows], column), dim=1)
            return
        if len(going) < len(self.mask):
            self.cache.batch_select_indices(rows)
        self.input_ids = column
        self.mask = torch.cat((self.mask[rows], self.mask.new_ones(len(going), 1)), dim=1)


@dataclass
class _Row:
    """One prompt and what has been generated for it."""

    index: int
    prompt: tuple[int, ...]
    settings: GenerationSettings
    tokenizer: PreTrainedTokenizerBase
    eos: frozenset[int]
    on_text: OnText | None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.generator = row_generator(self.settings.seed, self.index)
        self.context = self.prompt[-CONTEXT_TOKENS:]
        self.context_length = len(self._decode(self.context))

    def add(self, token: int) -> bool:
        """Take the next token; whether the row goes on."""
        self.ids.append(token)
        if token in self.eos:
            self.reason = "eos"
        elif len(self.ids) == self.settings.max_new_tokens:
            self.reason = "length"
        if self.reason or self.settings.stop or self.on_text:
            self._read_text()
        return self.reason is None

    def _read_text(self) -> None:
        """Decode what there is, look for stop strings, and send what can no longer change."""
        answer = self.ids[:-1] if self.reason == "eos" else self.ids
        self.text = self._decode((*self.context, *answer))[self.context_length :]
        cuts = [at for stop in self.settings.stop if (at := self.text.find(stop)) >= 0]
        if cuts:
            self.text, self.reason = self.text[: min(cuts)], "stop"
        ready = self.text if self.reason else self.text[: self._settled()]
        if self.on_text and len(ready) > self.sent:
            self.on_text(self.index, ready[self.sent :])
            self.sent = len(ready)

    def _settled(self) -> int:
        """How much of the text is final: not the bytes of an unfinished character, nor what may begin a stop string."""
        whole = self.text.rstrip("\ufffd")
        held = 0
        for stop in self.settings.stop:
            beginnings = (length for length in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:length]))
            held = max(held, next(beginnings, 0))
        return len(whole) - held

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def result(self) -> Generation:
        assert self.reason is not None
        return Generation(tuple(self.ids), self.text, self.reason)


def _virtual(loaded: LoadedModel) -> VirtualTokens | None:
    """The adapter's virtual tokens, computed without its dropout."""
    with torch.inference_mode(), _evaluating(loaded.model):
        return virtual_tokens(loaded)


def _check_prompts(loaded: LoadedModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings) -> None:
    context, virtual = loaded.context_length, loaded.num_virtual_tokens
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"generation: prompt {index} is empty; a model continues at least one token")
        if context is not None and len(prompt) + settings.max_new_tokens > context:
            ahead = f" (its {virtual} virtual tokens taken off)" if virtual else ""
            raise ConfigError(
                f"generation: prompt {index} has {len(prompt)} tokens, and with max_new_tokens "
                f"{settings.max_new_tokens} it exceeds the model's context of {context}{ahead}; shorten one of them"
            )


def _eos_ids(loaded: LoadedModel) -> frozenset[int]:
    """All tokens that end an answer: of the model's generation config and of the tokenizer."""
    own = getattr(loaded.model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, list) else [own]
    return frozenset(i for i in (*ids, loaded.tokenizer.eos_token_id) if i is not None)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode; each as it was afterwards (parts of a model may be frozen in it)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
