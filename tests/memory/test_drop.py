"""The store of policies that evict: a prompt until it is over, and then the most recent tokens alone."""

import pytest
import torch
from torch import Tensor

import kvframe
from kvframe import Drop
from kvframe.errors import UnsupportedCallError
from kvframe.memory.drop import DropStore
from kvframe.testing.cases import Case, Turn, make_call, make_layout, make_text

LAYOUT = make_layout(batch_size=2, num_kv_heads=2, head_dim=3, value_dim=4)
RECENT = 5


def rows(num_tokens: int = 30) -> Tensor:
    """Of two sequences, [2, H, n, D + Dv]."""
    text = make_text(LAYOUT, num_tokens, 0)
    return torch.cat([text.keys, text.values], -1)


def recalled(store: DropStore, wanted: list[int]) -> Tensor:
    """What a recall puts into slots that held 7 for the rows wanted of every head, -1 for none: [2, H, C, D + Dv]."""
    incoming = torch.tensor(wanted).expand(2, 2, -1)
    k_slots, v_slots = (states.fill_(7) for states in LAYOUT.zeros(len(wanted)))
    store.recall(incoming, k_slots, v_slots)
    return torch.cat([k_slots, v_slots], -1)


def after_a_prompt(num_tokens: int = 12) -> DropStore:
    """A prompt, of which the last tokens are in the window, as its block and its rest come."""
    store, given = DropStore(LAYOUT, 30), rows()
    store.hold_recent(RECENT)
    for batch in range(2):
        store.write(batch, 0, given[batch, :, : num_tokens - 3])
        store.write_recent(batch, num_tokens - 3, given[batch, :, num_tokens - 3 : num_tokens])
    store.finish_writes()
    return store


def append(store: DropStore, row: int) -> None:
    """The token of one row of every head."""
    given = rows()[:, :, row]
    store.append(torch.full((2, 2), row), given[..., :3], given[..., 3:])


def test_a_prompt_is_whole_until_a_step_has_selected():
    """Every row of it, and the step's own token, can be had in the first step after it."""
    store = after_a_prompt()
    append(store, 12)
    expected = rows()[:, :, [0, 8, 9, 12]]

    assert torch.equal(recalled(store, [0, 8, 9, 12]), expected)
    assert torch.equal(store.read(1, 13), rows()[1, :, :13])
    store.step_is_over()
    assert not store.read(1, 13).any()


def test_then_the_recent_tokens_are_left():
    """As many as the window can hold; a slot whose row is gone, or for which none is wanted, stays as it is."""
    store = after_a_prompt()
    for row in (12, 13, 14):
        append(store, row)
        store.step_is_over()
    slots = recalled(store, [14, -1, 10, 9, 11])

    assert torch.equal(slots[:, :, [0, 2, 4]], rows()[:, :, [14, 10, 11]])
    assert (slots[:, :, [1, 3]] == 7).all()


def test_a_block_takes_what_was_held():
    """Tokens that a chunk held back in the window lie elsewhere once a block has put them into unit order."""
    store = after_a_prompt()
    given = rows()
    for batch in range(2):
        store.write(batch, 9, given[batch, :, 9:16].flip(1))
    append(store, 16)
    store.step_is_over()

    assert (recalled(store, [9, 10, 11]) == 7).all()
    assert torch.equal(recalled(store, [16]), given[:, :, [16]])


def test_memory_is_let_go():
    """Once the prompt is gone, what is held no longer grows with the text; nothing is ever held on the host."""
    store = after_a_prompt()
    width, recent = 7 * 8, 4 * RECENT * (7 * 8 + 8)
    assert store.device_bytes() == 4 * 30 * width + recent
    store.step_is_over()
    store.grow(500)

    assert store.num_rows == 500 and store.device_bytes() == recent and store.host_bytes() == 0


def test_a_later_turn_is_held_again():
    """Its tokens come into a new pool, beside what is left."""
    store = after_a_prompt()
    append(store, 12)
    store.step_is_over()
    given = rows()
    for batch in range(2):
        store.write(batch, 13, given[batch, :, 13:20])
    slots = recalled(store, [13, 19, 12])

    assert torch.equal(slots, given[:, :, [13, 19, 12]])


def test_a_crop_cannot_bring_back():
    """Going back behind tokens that were dropped is refused, with the way out; nothing is changed."""
    policy = kvframe.policy("louiskv", sink_size=2, window_size=4, token_budget=12, cluster_size=4, dense_layers=())
    case = Case(turns=(Turn(chunks=(30,), num_steps=3),))
    layer = case.layer(policy.swap(transfer=Drop()), "offload")
    text = case.text(layer.layout)
    for call in case.calls():
        make_call(layer, text, case, call)
    with pytest.raises(UnsupportedCallError, match=r"Drop has dropped tokens.*(reset).*HostPool"):
        layer.crop(5)

    assert layer.lengths == [33, 30]
