"""Options given as `key=value` text."""

import string
from typing import TYPE_CHECKING, Any, Literal, Optional

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvframe.errors import ConfigError
from kvframe.options import configure, option_names, parse_options
from kvframe.stages import DecoupledUnits

if TYPE_CHECKING:
    from decimal import Decimal


@attrs.frozen(kw_only=True)
class Options:
    """A field for every annotation that text can serve, and some that it cannot."""

    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    label: str = ""
    layers: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    pair: tuple[int, str] = (0, "")
    limit: int | None = None
    old_style: Optional[float] = None  # noqa: UP045
    kind: Literal["mean", "max"] = "mean"
    page: Literal[16, 32] = 16
    heads: Literal["all"] | tuple[int, ...] = "all"
    either: int | str = 0
    switch: bool | int = 0
    nested: tuple[int | None, ...] = ()
    _hidden: int = 0
    scorer: object = None
    scorer_or_count: dict[str, int] | int = 0
    made: int = attrs.field(init=False, default=0)


def parse(text: str) -> Any:
    """The one value in `text`."""
    (value,) = parse_options(Options, [text]).values()
    return value


@pytest.mark.parametrize(
    "text, expected",
    [
        ("count=-3", -3),
        ("count= 4 ", 4),
        ("ratio=3", 3.0),
        ("ratio=1e-3", 0.001),
        ("flag=true", True),
        ("flag=No", False),
        ("flag=1", True),
        ("label=a=b", "a=b"),
        ("label=", ""),
        ("label=none", "none"),
        ("layers=0,1, 2", (0, 1, 2)),
        ("layers=0,", (0,)),
        ("layers=7", (7,)),
        ("layers=", ()),
        ("weights=1,0.5", (1.0, 0.5)),
        ("pair=3,x", (3, "x")),
        ("limit=none", None),
        ("limit=8", 8),
        ("old_style=None", None),
        ("old_style=0.5", 0.5),
        ("kind=max", "max"),
        ("page=32", 32),
        ("heads=all", "all"),
        ("heads=1,2", (1, 2)),
        ("either=12", 12),
        ("either=twelve", "twelve"),
        ("switch=1", 1),
        ("switch=on", True),
        ("nested=1,none", (1, None)),
        ("hidden=5", 5),
        ("scorer_or_count=5", 5),
        (" count =5", 5),
    ],
)
def test_text_becomes_the_annotated_type(text: str, expected: object):
    """Equal, and of the same type."""
    value = parse(text)

    assert expected == value and type(expected) is type(value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("count=many", "option 'count' of Options must be int, got 'many'"),
        ("count=1.5", "option 'count' of Options must be int, got '1.5'"),
        ("count=", "option 'count' of Options must be int, got ''"),
        ("ratio=nan", "option 'ratio' of Options must be float, got 'nan'"),
        ("flag=maybe", "option 'flag' of Options must be true or false, got 'maybe'"),
        ("layers=1,x", "option 'layers' of Options must be int values separated by commas, got '1,x'"),
        ("layers=1,,2", "option 'layers' of Options must be int values separated by commas, got '1,,2'"),
        ("pair=1", "option 'pair' of Options must be 2 values separated by commas (int, str), got '1'"),
        ("limit=no", "option 'limit' of Options must be int or none, got 'no'"),
        ("kind=sum", "option 'kind' of Options must be 'mean' or 'max', got 'sum'"),
        ("page=17", "option 'page' of Options must be 16 or 32, got '17'"),
        ("heads=some", "option 'heads' of Options must be 'all' or int values separated by commas, got 'some'"),
        ("scorer=x", "option 'scorer' of Options is of type object, which text cannot give; set it in Python"),
        ("cuont=1", "Options has no option 'cuont'; did you mean 'count'? (options: count, "),
        ("made=1", "Options has no option 'made' (options: count, "),
        ("count", "expected key=value, got 'count' (options: count, "),
    ],
)
def test_complaint_names_field_type_and_text(text: str, complaint: str):
    """And so the way out."""
    with pytest.raises(ConfigError) as raised:
        parse(text)

    assert str(raised.value).startswith(complaint)


def test_option_twice():
    """One of them is a mistake."""
    with pytest.raises(ConfigError, match="option 'count' of Options is given twice; keep one"):
        parse_options(Options, ["count=1", "count=2"])


def test_nothing_given():
    """Not even annotations are looked at."""
    assert parse_options(Options, []) == {}


def test_stage_cannot_be_given_as_text():
    """Stages within stages are composed in Python."""
    with pytest.raises(
        ConfigError, match="option 'prompt' of DecoupledUnits is of type UnitBuilder, which text cannot give"
    ):
        parse_options(DecoupledUnits, ["prompt=pages"])


def test_annotation_that_does_not_exist_at_run_time():
    """The author of the class can mend it."""

    @attrs.frozen
    class Late:
        amount: "Decimal"

    with pytest.raises(ConfigError, match="options of Late cannot be given as text: name 'Decimal' is not defined"):
        parse_options(Late, ["amount=1"])


def test_option_names_are_those_of_the_constructor():
    """Without the underscore of a private field, and without fields that are not given."""
    names = option_names(Options)

    assert "hidden" in names and "_hidden" not in names and "made" not in names


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "count": st.integers(),
            "ratio": st.floats(allow_nan=False),
            "flag": st.booleans(),
            "label": st.text(),
            "layers": st.lists(st.integers()).map(tuple),
            "weights": st.lists(st.floats(allow_nan=False)).map(tuple),
            "limit": st.none() | st.integers(),
            "kind": st.sampled_from(["mean", "max"]),
            "heads": st.just("all") | st.lists(st.integers()).map(tuple),
            "either": st.integers() | st.text(string.ascii_letters, min_size=1),
        },
    )
)
def test_what_is_printed_can_be_read_back(options: dict[str, Any]):
    """For every value whose text is unambiguous."""
    texts = [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in options.items()
    ]

    assert configure(Options, options) == configure(Options, parse_options(Options, texts))
