"""A dense layer is plain causal attention."""

import torch
from hypothesis import given

from kvframe.dense_layer import DenseLayer
from kvframe.testing.cases import Case
from kvframe.testing.reference import causal_attention_over
from kvframe.testing.strategies import cases


@given(case=cases())
def test_plain_attention(case: Case):
    """Through chunks, turns, left padding, and growth beyond the plan; all positions are attended."""
    layout = case.layout()
    layer = DenseLayer(layout, case.capacity or case.num_tokens)
    text = case.text(layout)
    expected = causal_attention_over(text, case, layout)
    for call in case.calls():
        states = text.span(call.start, call.stop)
        if call.is_prompt:
            out = layer.prompt(*states, case.num_real(call), call.stop - call.start)
        else:
            out = layer.decode(*states)
        lengths = [max(0, call.stop - num) for num in case.padding]
        torch.testing.assert_close(out, expected[:, :, call.start : call.stop], atol=1e-10, rtol=1e-10)
        assert layer.lengths == lengths
        assert [layer.attended_positions(batch, 0).tolist() for batch in range(case.batch_size)] == [
            list(range(length)) for length in lengths
        ]


def test_reset_and_memory():
    """A reset layer starts anew in the same memory: its planned rows, all on the device."""
    case = Case()
    layout = case.layout()
    text, layer = case.text(layout), DenseLayer(layout, case.num_tokens)
    num_real = [30, 27]
    first = layer.prompt(*text.span(0, 30), num_real, 30)
    size = layer.device_bytes()
    layer.reset()

    assert layer.lengths == [0, 0]
    assert torch.equal(layer.prompt(*text.span(0, 30), num_real, 30), first)
    assert layer.device_bytes() == size == 2 * 2 * case.num_tokens * layout.row_bytes
    assert (layer.host_bytes(), layer.index_bytes()) == (0, 0)
