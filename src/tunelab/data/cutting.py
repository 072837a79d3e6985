"""Token ids → an Example no longer than `max_length`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunelab.types import Completion, Example, Origin


def cut_example(
    prompt_ids: np.ndarray, completions: Sequence[Completion], max_length: int, origin: Origin
) -> Example | None:
    """Cut so that prompt plus completion, for each completion, is at most `max_length` (≥ 2) tokens.

    First the prompt from its left end, down to one token: the end of a prompt is what the answer answers. It is cut
    once, by what the longest completion needs, so that all completions still share it. What is then still too long is
    cut from the completion's right end (and with it goes its EOS, so the model does not learn to stop mid-sentence).

    prompt_ids: (P,), possibly empty. Returns None if a completion has no token with loss left.
    """
    longest = max(len(completion.ids) for completion in completions)
    excess = max(0, len(prompt_ids) + longest - max_length)
    prompt_cut = min(excess, max(0, len(prompt_ids) - 1))
    prompt_ids = prompt_ids[prompt_cut:]
    room = max_length - len(prompt_ids)
    kept = tuple(
        Completion(completion.ids[:room], completion.loss_mask[:room], max(0, len(completion.ids) - room))
        for completion in completions
    )
    if not all(completion.loss_mask.any() for completion in kept):
        return None
    return Example(prompt_ids, kept, origin, prompt_cut)
