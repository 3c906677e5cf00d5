"""Whatever a policy promises, this one and its stages keep."""

from hypothesis import strategies as st

from kvframe.testing import check_plugin


def test_everything_that_the_plugin_brings() -> None:
    """Promises, executions, swaps, plain data, and steps that a CUDA graph can repeat."""
    check_plugin("example", options={"max_stride": st.integers(1, 6)})
