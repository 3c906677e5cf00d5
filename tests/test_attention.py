"""What tokens of a prompt receive, added up in blocks."""

import math

import pytest
import torch

from kvframe import attention


@pytest.mark.parametrize("at_once", [1, 50, 1 << 20], ids=["one", "few", "all"])
@pytest.mark.parametrize("num_queries, num_dropped", [(7, 0), (7, 3), (11, 0), (1, 2)])
def test_attention_sums(monkeypatch: pytest.MonkeyPatch, at_once: int, num_queries: int, num_dropped: int):
    """The causal softmax of every query on its own, added up; what is dropped may hold anything."""
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(num_queries)
    query = torch.randn(4, num_queries, 8, generator=generator, dtype=torch.float64)
    keys = torch.randn(2, 11, 8, generator=generator, dtype=torch.float64)
    alive = torch.arange(11).expand(2, -1) >= num_dropped
    keys[:, :num_dropped] = torch.nan
    sums = attention.attention_sums(query, keys, 0.3, alive if num_dropped else None)

    expected = torch.zeros(2, 2, 11, dtype=torch.float64)
    for head in range(4):
        for row in range(num_queries):
            last = 11 - num_queries + row
            products = {t: 0.3 * float(query[head, row] @ keys[head // 2, t]) for t in range(num_dropped, last + 1)}
            total = sum(math.exp(product) for product in products.values())
            for token, product in products.items():
                expected[head // 2, head % 2, token] += math.exp(product) / total
    torch.testing.assert_close(sums, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_units_from_their_rows(dtype: torch.dtype):
    """Mean or largest of each unit's rows; rows of no unit, and bounds behind the last one, change nothing."""
    from kvframe import UnitTable

    offsets = torch.tensor([[[2, 4, 5, 9, 0, 3]]], dtype=dtype)
    units = UnitTable(offsets=offsets, num_units=torch.tensor([[3]]), max_units=5)
    numbers = torch.tensor([[[9.0, 9, 1, 3, -7, 4, 0, 0, 2, 9, 9]]])

    assert units.of_rows(numbers).tolist() == [[[2.0, -7.0, 1.5, -math.inf, -math.inf]]]
    assert units.of_rows(numbers, "amax").tolist() == [[[3.0, -7.0, 4.0, -math.inf, -math.inf]]]
