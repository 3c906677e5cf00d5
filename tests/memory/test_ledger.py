"""Room for units: enough for all that can come, and not much more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvframe import LayerLayout
from kvframe.memory.ledger import CLOSED, UNITS, Ledger

LAYOUT = LayerLayout(
    layer_idx=0, num_layers=1, batch_size=1, num_qo_heads=2, num_kv_heads=2, head_dim=4, value_dim=4,
    dtype=torch.float32, device=torch.device("cpu"), sm_scale=1.0,
)  # fmt: skip


def decode(ledger: Ledger, num_tokens: int, cuts: list[bool]) -> None:
    """Tokens one by one; a unit that leaves goes into the index."""
    for step in range(num_tokens):
        ledger.advance(torch.full((1, 2), cuts[step % len(cuts)]))
        leaves, _, size = ledger.leaving()
        ledger.release(leaves, size, torch.zeros_like(size))
        ledger.count_token()


@given(
    prompt=st.integers(1, 40), num_tokens=st.integers(0, 60), sink_size=st.integers(0, 5),
    window_size=st.integers(1, 25), min_size=st.integers(1, 5), more=st.integers(0, 9),
    cuts=st.lists(st.booleans(), min_size=1, max_size=7),
)  # fmt: skip
def test_room_is_enough(
    prompt: int, num_tokens: int, sink_size: int, window_size: int, min_size: int, more: int, cuts: list[bool]
):
    """Whatever closes units, no more of them close or leave than there is said to be room for."""
    sizes = {"sink_size": sink_size, "window_size": window_size, "min_size": min_size, "max_size": min_size + more}
    ledger = Ledger(LAYOUT, **sizes)
    # All of the prompt lies in the window: nothing has left yet.
    prompt = min(prompt, sink_size + window_size)
    ledger.finish_prompt(0, prompt, sink_size)
    ledger.end_prompt()
    num_closed, num_left = ledger.most_units(prompt + num_tokens)
    ledger.fit_units(num_closed)
    ledger.begin_decode()
    decode(ledger, num_tokens, cuts)

    assert int(ledger.counts[CLOSED].max()) <= num_closed
    assert int(ledger.counts[UNITS].max()) <= num_left <= num_closed


@pytest.mark.parametrize("window_size, expected", [(20, (10, 5)), (40, (10, 0)), (0, (10, 10))])
def test_room_is_no_more(window_size: int, expected: tuple[int, int]):
    """Where every unit is as short as can be, all of the room is used; what stays in the window needs no index."""
    ledger = Ledger(LAYOUT, sink_size=0, window_size=window_size, min_size=4, max_size=8)
    ledger.end_prompt()
    assert ledger.most_units(40) == expected
    ledger.fit_units(expected[0])
    ledger.begin_decode()
    decode(ledger, 41, [True])

    # The token after the last closes the unit before it.
    assert int(ledger.counts[CLOSED].max()) == expected[0]
