"""The cache of all layers of a rank, driven by plans of steps as the scheduler makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from skymoe.engine.kv_cache import PagedCache, bytes_per_token, paged_batch
from skymoe.engine.step import Chunk, StepPlan
from skymoe.ops.attention import attention_mask, causal_attention

FP8 = torch.float8_e4m3fn


def run(cache: PagedCache, steps: list[StepPlan], rows: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]) -> dict:
    """Each (sequence, position) through `steps`; a token's id names its sequence."""
    found = {}
    for step in steps:
        batch = paged_batch(step, cache.page_size)
        where = [(chunk.tokens[0], chunk.start + i) for chunk in step.chunks for i in range(len(chunk.tokens))]
        q, k, v = (torch.stack([rows[at][i] for at in where]) for i in range(3))
        cache.write(1, k, v, batch.slots_N)
        found |= dict(zip(where, cache.attend(1, q, batch, window=9), strict=True))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_two_sequences_in_chunks_and_decoding_are_as_each_at_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    lengths = {7: 37, 8: 21}
    rows = {
        (s, p): (torch.randn(4, 12), torch.randn(2, 12), torch.randn(2, 12))
        for s, n in lengths.items()
        for p in range(n)
    }
    pages = {7: (4, 0, 9, 5, 1), 8: (6, 3, 8)}

    def chunk(sequence: int, start: int, end: int) -> Chunk:
        return Chunk((sequence,) * (end - start), start, pages[sequence][: -(-end // 8)], 1)

    steps = [StepPlan((chunk(7, 0, 16),)), StepPlan((chunk(7, 16, 32), chunk(8, 0, 16)))]
    steps += [StepPlan((chunk(8, 16 + i, 17 + i), chunk(7, 32 + i, 33 + i))) for i in range(5)]
    found = run(PagedCache([0, 2], 10, 8, 12, dtype), steps, rows)
    whole = [StepPlan((chunk(7, 0, 37),)), StepPlan((chunk(8, 0, 21),))]
    wanted = run(PagedCache([0, 2], 10, 8, 12, dtype), whole, rows)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[at], wanted[at]) for at in wanted)
    for sequence, length in lengths.items():
        q, k, v = (torch.stack([rows[sequence, p][i] for p in range(length)]).transpose(0, 1)[None] for i in range(3))
        dense = causal_attention(q, k, v, attention_mask(length, length, window=9))[0].transpose(0, 1)
        paged = torch.stack([found[sequence, p] for p in range(length)])
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03, FP8: 0.2}[dtype]
        torch.testing.assert_close(paged, dense, rtol=tolerance, atol=tolerance)


def test_bytes_are_those_of_the_memory() -> None:
    for dtype in (torch.float32, torch.bfloat16, FP8):
        cache = PagedCache([3, 0, 2], 6, 16, 20, dtype)
        assert cache.num_bytes == 6 * 16 * bytes_per_token([3, 0, 2], 20, dtype)
    assert bytes_per_token([5], 128, FP8) == 2 * 5 * (128 + 4)


def test_a_layer_without_heads() -> None:
    cache = PagedCache([0], 4, 4, 8, torch.bfloat16)
    batch = paged_batch(StepPlan((Chunk((1, 2, 3), 0, (2,), 1),)), 4)
    cache.write(0, torch.empty(3, 0, 8), torch.empty(3, 0, 8), batch.slots_N)
    assert cache.attend(0, torch.empty(3, 0, 8), batch).shape == (3, 0, 8)


def test_heads_that_do_not_divide_must_say_whose_they_are() -> None:
    cache = PagedCache([2], 4, 4, 8, torch.float32)
    batch = paged_batch(StepPlan((Chunk((1, 2, 3), 0, (2,), 1),)), 4)
    q, kv = torch.randn(3, 3, 8), torch.randn(3, 2, 8)
    cache.write(0, kv, kv, batch.slots_N)
    with pytest.raises(AssertionError, match="which key/value head"):
        cache.attend(0, q, batch)
    one = cache.attend(0, q[:, 2:], batch, kv_of_head=[1])
    assert torch.equal(cache.attend(0, q, batch, kv_of_head=[0, 0, 1])[:, 2:], one)
