from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import skymoe.ops.attention
from skymoe.ops.attention import attention_mask, causal_attention, reference_attention


def sees(query: int, key: int, window: int | None, documents: list[int] | None) -> bool:
    if key > query or (window is not None and query - key >= window):
        return False
    return documents is None or documents[query] == documents[key]


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_the_mask_is_the_definition(data: st.DataObject) -> None:
    num_keys = data.draw(st.integers(1, 9))
    window = data.draw(st.sampled_from([None, 1, 2, 5, 20]))
    with_documents = data.draw(st.booleans())
    num_queries = num_keys if with_documents else data.draw(st.integers(1, num_keys))
    documents = None
    if with_documents:
        documents = [data.draw(st.lists(st.integers(0, 2), min_size=num_keys, max_size=num_keys)) for _ in range(2)]
    ids = None if documents is None else torch.tensor(documents)
    mask = attention_mask(num_queries, num_keys, window=window, document_ids_BT=ids)
    past = num_keys - num_queries
    for b in range(2):
        row_documents = None if documents is None else documents[b]
        expected = [[sees(past + q, k, window, row_documents) for k in range(num_keys)] for q in range(num_queries)]
        if mask is None:
            assert past == 0 and expected == torch.ones(num_keys, num_keys, dtype=torch.bool).tril().tolist()
        else:
            assert mask.dtype is torch.bool
            assert mask.expand(2, 1, num_queries, num_keys)[b, 0].tolist() == expected


def test_documents_and_a_cache_do_not_go_together() -> None:
    """One query's ids would otherwise broadcast over all keys and let it see every document."""
    with pytest.raises(AssertionError):
        attention_mask(1, 5, document_ids_BT=torch.zeros(2, 1, dtype=torch.int64))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("case", ["causal", "window", "documents", "cache", "decode", "decode with a window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("short", [0, 512], ids=["fused", "matmul"])
def test_fast_attention_is_the_reference(
    heads: int, kv_heads: int, case: str, dtype: torch.dtype, short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skymoe.ops.attention, "_SHORT", short)
    torch.manual_seed(0)
    num_keys = 11
    num_queries = {"cache": 4, "decode": 1, "decode with a window": 1}.get(case, num_keys)
    window = 3 if "window" in case else None
    documents = torch.tensor([[0] * 4 + [1] * 7, [2] * 10 + [0]]) if case == "documents" else None
    mask = attention_mask(num_queries, num_keys, window=window, document_ids_BT=documents)
    q = torch.randn(2, heads, num_queries, 6, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(2, kv_heads, num_keys, 6, dtype=dtype, requires_grad=True) for _ in range(2))
    ours, expected = causal_attention(q, k, v, mask), reference_attention(q, k, v, mask)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(ours, expected, **tolerance)
    direction = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad(y, (q, k, v), direction) for y in (ours, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_the_reference_by_hand() -> None:
    """Two tokens, one head: the first sees itself, the second weighs both by softmax(q k / sqrt(C))."""
    q = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]]])
    v = torch.tensor([[[[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]]])
    weights = torch.tensor([2.0 / 2, 6.0 / 2]).softmax(-1)
    expected = torch.tensor([[[[1.0, 0, 0, 0], [weights[0], weights[1], 0, 0]]]])
    torch.testing.assert_close(reference_attention(q, k, v, None), expected)
    torch.testing.assert_close(causal_attention(q, k, v, None), expected)
