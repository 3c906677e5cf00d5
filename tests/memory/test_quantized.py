"""The quantised host pool: what comes back of rows, by plain loops, and which rows were rounded together."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kvframe
from kvframe import QuantizedHostPool
from kvframe.errors import ConfigError
from kvframe.memory.quantized import KiviCodec
from kvframe.testing.cases import Case, Turn, attended, make_call, make_layout, make_text

shapes = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 4, 8]),
        "group_size": st.integers(1, 5),
        "head_dim": st.integers(1, 9),
        "value_dim": st.integers(1, 9),
    }
)


def make_codec(*, bits: int, group_size: int, head_dim: int, value_dim: int) -> KiviCodec:
    """For two heads, in float64."""
    layout = make_layout(num_kv_heads=2, head_dim=head_dim, value_dim=value_dim)
    return KiviCodec(layout=layout, bits=bits, group_size=group_size)


def rounded(numbers: list[float], bits: int) -> list[float]:
    """A group of numbers, rounded by the definition."""
    low, high = min(numbers), max(numbers)
    step = (high - low) / (2**bits - 1)
    return [low + step * round((number - low) / step) if step else low for number in numbers]


def rounded_token(numbers: list[float], codec: KiviCodec) -> list[float]:
    """A token's key, or value, in groups of channels; in one group where they do not come out even."""
    size = codec.group_size if len(numbers) % codec.group_size == 0 else len(numbers)
    return [
        number
        for start in range(0, len(numbers), size)
        for number in rounded(numbers[start : start + size], codec.bits)
    ]


def rounded_block(rows: list[list[float]], codec: KiviCodec) -> list[list[float]]:
    """A block of one head: keys of every full group of rows per channel, all else per token."""
    width, size = codec.layout.head_dim, codec.group_size
    expected = [rounded_token(row[:width], codec) + rounded_token(row[width:], codec) for row in rows]
    for start in range(0, len(rows) - size + 1, size):
        for channel in range(width):
            column = rounded([row[channel] for row in rows[start : start + size]], codec.bits)
            for place, number in enumerate(column):
                expected[start + place][channel] = number
    return expected


def random_rows(codec: KiviCodec, num_rows: int, seed: int) -> torch.Tensor:
    """[2, n, D + Dv]"""
    width = codec.layout.head_dim + codec.layout.value_dim
    return torch.randn(2, num_rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(shape=shapes, num_rows=st.integers(1, 13), seed=st.integers(0, 2**16))
def test_a_prompt_block(shape: dict[str, int], num_rows: int, seed: int):
    """Keys are rounded per channel over `group_size` rows, values per token; a rest of rows per token throughout."""
    codec = make_codec(**shape)
    rows = random_rows(codec, num_rows, seed)
    expected = torch.tensor([rounded_block(head, codec) for head in rows.tolist()], dtype=torch.float64)

    torch.testing.assert_close(codec.block(rows), expected, atol=1e-12, rtol=0)


@given(shape=shapes, seed=st.integers(0, 2**16))
def test_tokens_one_by_one(shape: dict[str, int], seed: int):
    """Key and value of a token are rounded in groups of channels, whatever other tokens there are."""
    codec = make_codec(**shape)
    width = codec.layout.head_dim
    rows = random_rows(codec, 3, seed)
    expected = [
        [rounded_token(row[:width], codec) + rounded_token(row[width:], codec) for row in head]
        for head in rows.tolist()
    ]

    torch.testing.assert_close(codec.tokens(rows), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("bits, num_bytes", [(2, 96), (4, 160), (8, 288)])
def test_bytes_of_a_row(bits: int, num_bytes: int):
    """Heads of 128 numbers in bfloat16, 512 bytes: the codes, and step and least of four groups each of key and value,
    32 bytes; whole vectors of 32 bytes."""
    layout = make_layout(head_dim=128, dtype=torch.bfloat16)
    transfer = QuantizedHostPool(bits=bits, group_size=32)

    assert layout.row_bytes == 512 and transfer.row_bytes(layout) == num_bytes
    assert transfer.host_bytes(layout, 10) == 10 * 2 * 2 * num_bytes


class TestStore:
    """Which rows the store takes to have been rounded together."""

    layout = make_layout(batch_size=1, num_kv_heads=2, head_dim=4)
    transfer = QuantizedHostPool(bits=2, group_size=3)

    def rows(self) -> torch.Tensor:
        """Of one sequence, [2, 20, 8]."""
        text = make_text(self.layout, 20, 0)
        return torch.cat([text.keys, text.values], -1)[0]

    def test_blocks_that_begin_anywhere(self):
        """Groups are counted from the start of each block, and found again after the store has grown."""
        store, rows, codec = self.transfer.init(self.layout, 9), self.rows(), self.transfer.codec(self.layout)
        store.write(0, 1, rows[:, 1:9])
        store.grow(20)
        store.write(0, 9, rows[:, 9:14])
        store.write(0, 14, rows[:, 14:20])
        expected = [codec.block(rows[:, start:stop]) for start, stop in ((1, 9), (9, 14), (14, 20))]

        assert torch.equal(store.read(0, 20)[:, 1:], torch.cat(expected, 1))

    @pytest.mark.parametrize("how", ["recent", "append"])
    def test_rows_that_a_block_had_before(self, how: str):
        """After a reset, or a crop, tokens that come one by one are read as they were stored, not with their groups'
        scales; those of other heads are not touched."""
        store, rows, codec = self.transfer.init(self.layout, 20), self.rows(), self.transfer.codec(self.layout)
        store.write(0, 0, rows)
        expected = codec.block(rows)
        if how == "recent":
            store.write_recent(0, 4, -rows[:, 4:6])
            expected[:, 4:6] = codec.tokens(-rows[:, 4:6])
        else:
            places = torch.tensor([[4, 5]])
            fresh = torch.stack([-rows[0, 4], -rows[1, 5]])
            store.append(places, fresh[None, :, :4], fresh[None, :, 4:])
            expected[0, 4], expected[1, 5] = codec.tokens(fresh)

        assert torch.equal(store.read(0, 20), expected)


def test_a_shorter_prompt_after_a_reset():
    """A layer that was reset gives what a new one gives, though its rows lay in another prompt's groups."""
    policy = kvframe.policy(
        "louiskv", sink_size=2, window_size=4, token_budget=12, cluster_size=4, dense_layers=()
    ).swap(trigger=kvframe.EveryStep(), transfer=QuantizedHostPool(bits=2, group_size=4))
    short = Case(turns=(Turn(chunks=(15,), num_steps=40),))
    long = Case(turns=(Turn(chunks=(54,), num_steps=1),))
    layer, fresh = short.layer(policy, "offload"), short.layer(policy, "offload")
    for call in long.calls():
        make_call(layer, long.text(layer.layout), long, call)
    layer.reset()
    text = short.text(layer.layout)
    for call in short.calls():
        assert torch.equal(make_call(layer, text, short, call), make_call(fresh, text, short, call))
        if not call.is_prompt:
            assert attended(layer) == attended(fresh)


@pytest.mark.parametrize("bits", [1, 3, 16, 4.0, True, None])
def test_bits_that_are_none(bits: object):
    """Codes have to fill a byte."""
    with pytest.raises(ConfigError, match=r"QuantizedHostPool\.bits must be one of 2, 4, 8; got"):
        QuantizedHostPool(bits=bits)


@pytest.mark.parametrize("group_size", [0, -4, 2.0])
def test_groups_that_are_none(group_size: object):
    """A group has a token at least."""
    with pytest.raises(ConfigError, match=r"QuantizedHostPool\.group_size must be an integer >= 1, got"):
        QuantizedHostPool(group_size=group_size)
