"""OmniKV by its definition: the tokens with the largest products in the last filter layer serve all heads behind it."""

import math

import pytest
import torch
from baselines.plain import attention, best_tokens, dot, steps_of

import kvframe
from kvframe.errors import ConfigError
from kvframe.testing.cases import Case, Turn
from kvframe.testing.models import model_inputs, tiny_llama


@pytest.mark.parametrize("softmax", [True, False])
def test_all_heads_take_the_filter_layer_s_tokens(softmax: bool):
    """The largest product, or share, over all query heads of the layer before; the same tokens for every KV head."""
    policy = kvframe.policy("omnikv", token_budget=9, sink_size=2, window_size=4, filter_layers=(0, 1), softmax=softmax)
    steps = steps_of(policy)
    for first, second in zip(steps[::2], steps[1::2]):
        assert (first.batch, first.head, second.head) == (second.batch, 0, 1)
        scores = []
        for head in (first, second):
            scale = 1 / math.sqrt(len(head.keys[0]))
            products = [[scale * dot(query, key) for key in head.keys] for query in head.queries]
            scores += attention(head.queries, head.keys) if softmax else products
        best = [max(column) for column in zip(*scores)]
        wanted = best_tokens(first.units, [best[unit[0]] for unit in first.units], 9)
        assert first.retrieved == second.retrieved == wanted


def test_each_layer_goes_by_the_last_filter_before_it():
    """In a model, layers between filters attend to the same tokens, those of different filters to other ones."""
    case = Case(batch_size=1, padding=(0,), turns=(Turn(chunks=(40,), num_steps=4),))
    policy = kvframe.policy("omnikv", token_budget=6, sink_size=2, window_size=4, filter_layers=(1, 4))
    inputs = model_inputs(case)
    model = tiny_llama(num_layers=7)
    with kvframe.attach(model, policy) as run, torch.no_grad():
        cache = run.new_cache(case.num_tokens)
        cache.prompt_end = 40
        model(**inputs.span(0, 40), past_key_values=cache)
        cache.prompt_end = None
        differ = False
        for column in range(40, 44):
            model(**inputs.span(column, column + 1), past_key_values=cache)
            seen = [[cache.attended_positions(layer, 0, head).tolist() for head in (0, 1)] for layer in range(7)]
            everything = list(range(column + 1))
            assert all(seen[layer] == [everything] * 2 for layer in (0, 1, 4))
            assert seen[2][0] == seen[2][1] == seen[3][0] == seen[3][1] != everything
            assert seen[5][0] == seen[5][1] == seen[6][0] == seen[6][1] != everything
            differ |= seen[2] != seen[5]
    assert differ


@pytest.mark.parametrize(
    "dense, message",
    [
        ((0,), r"SharedTokens filters in layer 1, which is not dense"),
        ((1,), r"layer 0 retrieves before the first filter layer of SharedTokens, 1; make it dense"),
    ],
)
def test_filters_that_cannot_serve_are_refused(dense: tuple[int, ...], message: str):
    """Before anything is attached, with what to change."""
    policy = kvframe.policy("omnikv", filter_layers=(1,)).swap(dense_layers=dense)
    with pytest.raises(ConfigError, match=message), kvframe.attach(tiny_llama(num_layers=3), policy):
        pass


def test_a_filter_that_the_model_does_not_have():
    """Names the layers that there are."""
    policy = kvframe.policy("omnikv", filter_layers=(0, 5)).swap(dense_layers=(0,))
    with (
        pytest.raises(ConfigError, match=r"filters in layer 5, which has no full KV cache; those that have: 0, 1, 2"),
        kvframe.attach(tiny_llama(num_layers=3), policy),
    ):
        pass


@pytest.mark.parametrize("layers", [(), (3, 1), (1, 1)])
def test_filter_layers_ascend(layers: tuple[int, ...]):
    """None, or not in order, is refused."""
    with pytest.raises(ConfigError, match="must be layers in ascending order"):
        kvframe.policy("omnikv", filter_layers=layers)


def test_published_defaults():
    """Filters 2, 8 and 18; layers before the first are dense."""
    policy = kvframe.policy("omnikv")

    assert policy.scorer.sources == (2, 8, 18)
    assert policy.dense_layers == (0, 1, 2, 8, 18)
