"""Did you mean?"""

from hypothesis import given
from hypothesis import strategies as st

from kvframe.suggest import closest, hint

KNOWN = ["mean-key", "page", "token_budget", "a-b-c-d"]


def test_near_miss():
    """One letter wrong is enough to guess."""
    assert hint("pages", KNOWN) == "; did you mean 'page'? (known: mean-key, page, token_budget, a-b-c-d)"


def test_far_miss():
    """A guess at random would mislead."""
    assert hint("zzz", KNOWN, "options") == " (options: mean-key, page, token_budget, a-b-c-d)"


def test_nothing_known():
    """An empty list is said to be one."""
    assert hint("x", []) == " (known: none)"


@given(st.sampled_from(KNOWN), st.sampled_from([str.upper, str.title, lambda name: name.replace("-", "_")]))
def test_spelling_is_no_difference(name, respell):
    """Case and the kind of dash are what people mix up."""
    assert name == closest(respell(name), KNOWN)


@given(st.text(), st.lists(st.text()))
def test_suggestion_is_a_known_name(name, known):
    """Or there is none."""
    assert closest(name, known) in [None, *known]
