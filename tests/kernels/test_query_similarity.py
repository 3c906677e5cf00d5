"""`query_similarity` against its definition, in Python floats."""

import pytest
import torch
from helpers import cosine
from hypothesis import given
from hypothesis import strategies as st

from kvframe_kernels.query_similarity import query_similarity


@given(
    batch_size=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([1, 2, 7, 63]),
    per_kv_head=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_definition(batch_size: int, num_kv_heads: int, group_size: int, head_dim: int, per_kv_head: bool, seed: int):
    """The mean cosine over all query heads, the same for each KV head, or over the heads of each group alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, num_kv_heads * group_size, head_dim)
    query, previous = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    similarity = query_similarity(query, previous, num_kv_heads, per_kv_head)

    assert similarity.shape == (batch_size, num_kv_heads)
    for batch in range(batch_size):
        cosines = [cosine(q, p) for q, p in zip(query[batch].tolist(), previous[batch].tolist(), strict=True)]
        for head in range(num_kv_heads):
            own = cosines[head * group_size : (head + 1) * group_size] if per_kv_head else cosines
            assert float(similarity[batch, head]) == pytest.approx(sum(own) / len(own), abs=1e-12)


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_length_does_not_matter(per_kv_head: bool):
    """A query twice as long is the same direction; one turned round is the opposite; zero is neither."""
    query = torch.tensor([[[3.0, 4.0], [0.0, 1e-3]]], dtype=torch.float64)

    def similarity(previous: torch.Tensor) -> list[float]:
        return query_similarity(query, previous, 2, per_kv_head)[0].tolist()

    assert similarity(2 * query) == pytest.approx([1.0, 1.0])
    assert similarity(-query) == pytest.approx([-1.0, -1.0])
    assert similarity(0 * query) == [0.0, 0.0]


@given(
    head_dim=st.sampled_from([2, 7, 8, 63]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_no_cosine_is_beyond_one(head_dim: int, dtype: torch.dtype, seed: int):
    """Rounding carries no cosine past 1 or -1, so that a threshold of -1 is never undercut."""
    query = torch.randn(64, 2, head_dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    assert query_similarity(query, -query, 1, False).min() >= -1
    assert query_similarity(query, query, 1, True).max() <= 1


@pytest.mark.parametrize(
    "dtype, expected", [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]
)
def test_precision(dtype: torch.dtype, expected: torch.dtype):
    """At least float32, where the squares of half precision queries do not overflow."""
    query = torch.full((1, 2, 8), 300.0, dtype=dtype)
    similarity = query_similarity(query, query, 1, False)

    assert similarity.dtype == expected
    assert similarity.tolist() == [[pytest.approx(1.0)]]
