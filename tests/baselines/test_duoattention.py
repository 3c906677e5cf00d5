"""DuoAttention (arXiv 2410.10819) by its definition: retrieval heads see everything, the others sinks and window."""

import pytest
import torch
from baselines.plain import CASE, Step, attention, steps_of

import kvframe
from kvframe.errors import ConfigError
from kvframe.testing.cases import Case, Turn
from kvframe.testing.models import play_model, tiny_llama

OPTIONS = {"sink_size": 2, "window_size": 6}
TEXT = CASE.text(CASE.layout())


def share_outside(step: Step, num_queries: int) -> float:
    """Share of the last prompt queries' attention that is neither at sinks nor among the six nearest, group's mean."""
    total, group = 0.0, CASE.group_size
    for position in range(step.num_prompt - num_queries, step.num_prompt):
        column = position + CASE.padding[step.batch]
        queries = TEXT.query[step.batch, step.head * group : (step.head + 1) * group, column].tolist()
        for weights in attention(queries, step.keys[: position + 1]):
            far = [weight for token, weight in enumerate(weights) if 2 <= token <= position - 6]
            total += sum(far) / group / num_queries
    return total


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("sparsity, num_full", [(0.0, 2), (0.5, 1), (1.0, 0)])
def test_heads_whose_attention_leaves_sinks_and_window_retrieve(offload: bool, sparsity: float, num_full: int):
    """The share `sparsity` of the heads streams, those with the lowest scores; at every step the same."""
    policy = kvframe.policy("duoattention", **OPTIONS, num_queries=5, sparsity=sparsity, offload=offload)
    steps = steps_of(policy)
    for one, other in zip(steps[::2], steps[1::2]):
        scores = [share_outside(step, 5) for step in (one, other)]
        ranked = sorted(range(2), key=lambda head: -scores[head])
        for step in (one, other):
            length = len(step.keys)
            if step.head in ranked[:num_full]:
                assert step.attended == list(range(length))
            else:
                assert step.attended == [0, 1, *range(length - step.window, length)]


def test_all_heads_of_all_layers_compete():
    """Of twelve heads four retrieve; layers need not have the same number of them."""
    case = Case(batch_size=2, padding=(0, 4), turns=(Turn(chunks=(40,), num_steps=3), Turn(chunks=(9,), num_steps=2)))
    policy = kvframe.policy("duoattention", **OPTIONS, num_queries=5, sparsity=2 / 3)
    trace = play_model(tiny_llama(num_layers=6), policy, case, "offload")
    for step, length in zip(trace.attended, (41, 42, 43, 53, 54)):
        for batch, own in enumerate((length, length - 4)):
            full = [[len(head) == own for head in layer[batch]] for layer in step]
            assert sum(map(sum, full)) == 4
    counts = {sum(len(head) == 41 for head in layer[0]) for layer in trace.attended[0]}
    assert len(counts) > 1


def test_given_heads():
    """What is given is taken, and the prompt is not asked."""
    case = Case(batch_size=1, padding=(0,), turns=(Turn(chunks=(30,), num_steps=2),))
    policy = kvframe.policy("duoattention", **OPTIONS, full_heads=((1,), (), (0, 1)))
    assert not policy.trigger.reads_prompt
    trace = play_model(tiny_llama(num_layers=3), policy, case, "offload")
    full = [
        [[len(head) == length for head in layer[0]] for layer in step] for step, length in zip(trace.attended, (31, 32))
    ]
    assert full == [[[False, True], [False, False], [True, True]]] * 2


@pytest.mark.parametrize(
    "heads, message",
    [
        (((0,),), r"full_heads has 1 layers, the model has 2; give a tuple for every layer"),
        (((0,), (2,)), r"names KV head 2 in layer 1, the model has heads 0 to 1"),
    ],
)
def test_heads_that_do_not_fit_the_model(heads: tuple[tuple[int, ...], ...], message: str):
    """Refused when they meet it."""
    policy = kvframe.policy("duoattention", full_heads=heads)
    model = tiny_llama(num_layers=2)
    with pytest.raises(ConfigError, match=message), kvframe.attach(model, policy):
        model.generate(torch.ones(1, 9, dtype=torch.int64), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("heads", [(0, 1), ((-1,),), "all"])
def test_heads_that_cannot_be(heads: object):
    """A head is a number, and every layer has a tuple of them."""
    with pytest.raises((ConfigError, TypeError), match="full_heads must be None or a tuple|not iterable"):
        kvframe.policy("duoattention", full_heads=heads)


def test_published_defaults():
    """128 sinks, 256 recent tokens, all KV on the device."""
    policy = kvframe.policy("duoattention")

    assert (policy.sink_size, policy.window_size) == (128, 256)
    assert (policy.trigger.sink_size, policy.trigger.recent_size) == (128, 256)
    assert policy.transfer == kvframe.KeepOnDevice()
