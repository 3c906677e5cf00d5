"""The conformance kit: what the author of a stage or a policy runs in a test, without a GPU.

    from kvframe.testing import check_policy

    def test_my_policy():
        check_policy("my-policy")

Needs hypothesis, which `pip install 'kvframe[testing]'` brings.
"""

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:
    raise ImportError("kvframe.testing draws its examples with hypothesis; pip install 'kvframe[testing]'") from error

from kvframe.testing.broken import Broken
from kvframe.testing.cases import Case, Text, Trace, Turn, make_layout, make_text, play
from kvframe.testing.conformance import (
    ConformanceError,
    Failure,
    Outcome,
    Summary,
    check_plugin,
    check_policy,
    check_stage,
)
from kvframe.testing.promises import Promise, all_promises
from kvframe.testing.strategies import cases, compositions, options, stages, turns, variants

__all__ = [
    "Broken",
    "Case",
    "ConformanceError",
    "Failure",
    "Outcome",
    "Promise",
    "Summary",
    "Text",
    "Trace",
    "Turn",
    "all_promises",
    "cases",
    "check_plugin",
    "check_policy",
    "check_stage",
    "compositions",
    "make_layout",
    "make_text",
    "options",
    "play",
    "stages",
    "turns",
    "variants",
]
