"""NEFTune (Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning"): noise on token embeddings."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import torch
from torch import Tensor

from tunelab.types import Batch, Segment


def embedding_noise(batch: Batch, alpha: float, width: int) -> Tensor:
    """ε·α/√(L·d) for every token, ε uniform in (−1, 1): the paper's algorithm 1. (T, D) float32, D = `width`.

    L is the length of the sequence that the token belongs to, its prompt included: the longest of them for a prompt
    that several share. Drawn from the global generator of the batch's device, which checkpoints hold, so a resumed run
    draws the same.
    """
    device = batch.input_ids.device
    lengths = _sequence_lengths(batch.segments, device)
    noise = torch.empty(batch.num_tokens, width, device=device).uniform_(-1.0, 1.0)
    return noise.mul_(alpha * (lengths * width).rsqrt()[:, None])


@lru_cache(maxsize=8)
def _sequence_lengths(segments: tuple[Segment, ...], device: torch.device) -> Tensor:
    """(T,) float32"""
    longest: dict[int, int] = defaultdict(int)
    for segment in segments:
        if segment.prefix_length:
            whole = segment.prefix_length + segment.stop - segment.start
            longest[segment.prefix_start] = max(longest[segment.prefix_start], whole)
    lengths = [
        max(longest[segment.start], segment.prefix_length + segment.stop - segment.start) for segment in segments
    ]
    counts = torch.tensor([segment.stop - segment.start for segment in segments])
    return torch.tensor(lengths, dtype=torch.float32).repeat_interleave(counts).to(device, non_blocking=True)
