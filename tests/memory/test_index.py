"""The unit index: one entry a unit, kept while it grows."""

import pytest
import torch
from attrs import frozen
from torch import Tensor

from kvframe import MeanKey, SketchRerank
from kvframe.memory.index import RowIndex, UnitIndex
from kvframe.testing.cases import make_layout
from kvframe_baselines import AccumulatedAttention


def test_entries_stay_where_they_were_put():
    """Blocks of one sequence, before and after the index has grown."""
    layout = make_layout(batch_size=2, num_kv_heads=2, head_dim=4)
    index = UnitIndex(layout, MeanKey())
    index.reserve(5)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64)
    expected = torch.zeros(2, 2, 9, 4, dtype=torch.float64)
    columns = torch.tensor([[0, 1, 2], [2, 3, 4]])
    index.write(1, columns, {"mean_key": block})
    for head in range(2):
        expected[1, head, columns[head]] = block[head]
    index.reserve(9)
    last = torch.tensor([[0, 8], [5, 6]])
    index.write(0, last, {"mean_key": other})
    for head in range(2):
        expected[0, head, last[head]] = other[head]

    assert torch.equal(index.view(9)["mean_key"], expected)
    assert torch.equal(index.view(4)["mean_key"], expected[:, :, :4])
    assert index.nbytes() >= expected.nbytes


def test_without_entries():
    """A scorer that keeps nothing of a unit has an index all the same, with room for units."""
    index = UnitIndex(make_layout(), AccumulatedAttention())
    index.reserve(7)
    assert (index.max_units, index.view(7), index.nbytes()) == (7, {}, 0)

    index.fit(4)
    assert index.max_units == 4


def test_reserving_less_changes_nothing():
    """What there is room for stays."""
    index = UnitIndex(make_layout(), MeanKey())
    index.reserve(7)
    size = index.nbytes()
    index.reserve(3)

    assert index.nbytes() == size


@frozen(kw_only=True)
class KeepsNothing(MeanKey):
    """Goes by the notes of tokens, so that no tensor shows how much room there is."""

    name = "keeps-nothing"

    def index(self, keys: Tensor, values: Tensor, unit_ids: Tensor, num_units: int) -> dict[str, Tensor]:
        return {}


@pytest.mark.parametrize("scorer", [MeanKey(), KeepsNothing()], ids=lambda scorer: scorer.name)
def test_room(scorer: MeanKey):
    """It grows, and is cut where less is needed; all tensors have a column more."""
    index = UnitIndex(make_layout(), scorer)
    rooms = [index.max_units]
    for make_room, num_units in ((index.reserve, 7), (index.reserve, 3), (index.fit, 4), (index.fit, 9)):
        make_room(num_units)
        rooms.append(index.max_units)
        assert {tensor.shape[2] for tensor in index.tensors.values()} <= {index.max_units + 1}

    assert rooms == [0, 7, 7, 4, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_channels(dtype: torch.dtype):
    """Of each sequence and head: root mean square of keys less the mean of their unit, over its first block. Later
    blocks do not move them, nor does a block after decoding began; another text does. They count as memory."""
    layout = make_layout(batch_size=2, num_kv_heads=2, head_dim=3, dtype=dtype)
    rows = RowIndex(layout, SketchRerank(scales="channel", bits=8), 20)
    bare = RowIndex(layout, SketchRerank(scales="token", bits=8), 20)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 6, 3, generator=generator).to(dtype)
    keys[..., 1] = 0  # a channel that is nothing has the size 1
    unit_ids = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2]])
    expected = torch.ones(2, 2, 3)
    for head in range(2):
        units = [keys[head, unit_ids[head] == unit].float() for unit in range(3)]
        rest = torch.cat([unit - unit.mean(0) for unit in units])
        expected[1, head, [0, 2]] = rest.square().mean(0).sqrt()[[0, 2]]

    def sizes() -> Tensor:
        assert rows.channels is not None and rows.channels.dtype == torch.float32
        return rows.channels.clone()

    rows.write(1, 2, keys, keys, unit_ids, 3)
    first = sizes()
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-3)
    rows.write(1, 8, 5 * keys, keys, unit_ids, 3)
    rows.begin_decode()
    rows.write(0, 2, keys, keys, unit_ids, 3)
    assert torch.equal(sizes(), first)
    assert rows.nbytes() == bare.nbytes() + first.nbytes
    rows.forget()
    assert (sizes() == 1).all()
    rows.write(0, 2, keys, keys, unit_ids, 3)
    assert torch.equal(sizes()[0], first[1])
