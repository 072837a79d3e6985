"""Attention over segments: alignment by hand, blocks of any size, and the plan of the variable-length kernel.

The kernel itself runs on CUDA only; here it is replaced by its definition (each sequence alone, softmax over the keys a
query may see, bottom-right), so that what is tested is which rows are handed to it.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tunelab.models import segments
from tunelab.models.segments import plan_parts, plan_varlen, segment_attention
from tunelab.types import Segment

ROW = (Segment(0, 5), Segment(5, 9, 0, 5), Segment(9, 16, 0, 5), Segment(16, 24), Segment(24, 25))
"""A pair with a shared prompt of 5, a lone sequence of 8, and one of a single token."""

RANGES = ((4, 5), (5, 8), (10, 16), (0, 0), (24, 25))


def draw(heads: int, num_kv: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(25, count, 6, generator=generator, requires_grad=True) for count in (heads, num_kv, num_kv)
    )  # type: ignore[return-value]


def plain(query: Tensor, key: Tensor, value: Tensor, ranges: tuple[tuple[int, int], ...] | None) -> Tensor:
    """One query and head at a time, from the definition."""
    group = query.shape[1] // key.shape[1]
    outputs = []
    for i, segment in enumerate(ROW):
        start, stop = (segment.start, segment.stop) if ranges is None else ranges[i]
        for position in range(start, stop):
            seen = [*range(segment.prefix_start, segment.prefix_stop), *range(segment.start, position + 1)]
            heads = []
            for head in range(query.shape[1]):
                scores = 0.4 * key[seen, head // group] @ query[position, head]
                heads.append(scores.softmax(0) @ value[seen, head // group])
            outputs.append(torch.cat(heads))
    return torch.stack(outputs)


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("ranges", [None, RANGES], ids=["all", "tail"])
@pytest.mark.parametrize(("heads", "num_kv"), [(4, 4), (4, 2), (3, 1)])
def test_output_and_gradients_are_the_definitions(
    heads: int, num_kv: int, ranges: tuple[tuple[int, int], ...] | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "BLOCK_QUERIES", {"cpu": block})
    inputs = draw(heads, num_kv)
    expected = plain(*inputs, ranges)
    upstream = torch.linspace(-1, 2, expected.numel()).cos().view_as(expected)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    found = segment_attention(*inputs, plan_parts(ROW, ranges), 0.4)
    torch.testing.assert_close(found, expected)
    for gradient, gradient_wanted in zip(torch.autograd.grad(found, inputs, upstream), wanted, strict=True):
        torch.testing.assert_close(gradient, gradient_wanted)


def test_fewer_queries_than_keys_are_aligned_bottom_right() -> None:
    """Two queries at the end of four keys: the first sees three, the second four. Values name their keys."""
    value = torch.eye(4)[:, None, :]
    parts = plan_parts((Segment(0, 4),), ((2, 4),))
    found = segment_attention(torch.zeros(4, 1, 4), torch.zeros(4, 1, 4), value, parts, 1.0)
    third = 1 / 3
    torch.testing.assert_close(found, torch.tensor([[third, third, third, 0.0], [0.25, 0.25, 0.25, 0.25]]))


def kernel(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` by its documentation."""
    assert window_size == (-1, 0), "causal"
    assert enable_gqa or query.shape[1] == key.shape[1]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    outputs = []
    for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        scores = torch.einsum("qhk,mhk->hqm", query[a:b], key[c:d]) * scale
        hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        outputs.append(torch.einsum("hqm,mhk->qhk", scores.masked_fill(hidden, -torch.inf).softmax(-1), value[c:d]))
    return torch.cat(outputs)


def kernel_of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("kernel", [kernel, kernel_of_torch_2_11])
@pytest.mark.parametrize("ranges", [None, RANGES], ids=["all", "tail"])
@pytest.mark.parametrize(("heads", "num_kv"), [(4, 4), (4, 2)])
def test_the_variable_length_kernel_is_handed_the_right_rows(
    heads: int, num_kv: int, ranges: tuple[tuple[int, int], ...] | None, kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    inputs = draw(heads, num_kv)
    expected = plain(*inputs, ranges)
    found = segments._varlen_attention(*inputs, plan_parts(ROW, ranges), 0.4)
    torch.testing.assert_close(found, expected)
    upstream = torch.ones_like(expected)
    for gradient, wanted in zip(
        torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_rows_in_order_need_no_index() -> None:
    plan = plan_varlen(plan_parts((Segment(0, 3), Segment(3, 8))), torch.device("cpu"))
    assert plan.query_index is None
    assert plan.key_index is None
    assert plan.cu_queries.tolist() == plan.cu_keys.tolist() == [0, 3, 8]
    assert (plan.longest_query, plan.longest_key) == (5, 5)
