"""Who takes part in a decode benchmark, as it is written."""

import pytest

from kvframe import EstimateRest, MissedShare, TopBudget
from kvframe.bench.contender import Sizes, make_policy, parse_contenders, policy_by_name
from kvframe.errors import ConfigError


def test_parts_of_a_label() -> None:
    """Name, options, rate, compile; none of them is needed but the name."""
    plain, whole = parse_contenders("louiskv, louiskv-plus:bits=2:missed_share=0.1@0.5+compile", compile=False)

    assert (plain.name, plain.options, plain.fire_rate, plain.compile) == ("louiskv", (), None, False)
    assert (whole.name, whole.fire_rate, whole.compile) == ("louiskv-plus", 0.5, True)
    assert whole.options == ("bits=2", "missed_share=0.1")
    assert whole.label == "louiskv-plus:bits=2:missed_share=0.1@0.5+compile"


def test_options_reach_the_policy() -> None:
    """Beside the sizes that every policy gets."""
    policy = policy_by_name("louiskv-plus", Sizes(token_budget=64), ("missed_share=none", "bits=none"))

    assert policy.selector == EstimateRest(selector=TopBudget(token_budget=64))
    assert not isinstance(policy.trigger, MissedShare)


@pytest.mark.parametrize("label", ["louiskv:bits=4", "louiskv-plus:bits", "louiskv-plus:bits=many"])
def test_options_that_there_are_none_of(label: str) -> None:
    """What the policy does not take, or what is no value of it, is an error."""
    (contender,) = parse_contenders(label, compile=False)
    with pytest.raises(ConfigError):
        make_policy(contender, Sizes(), 100, fire_rate=0.1, miss=0.3, page_miss=0.3, steps=10)
