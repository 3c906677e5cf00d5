"""One layer's step: calls the five stages in order. It has no policy of its own."""

from kvframe.runtime.blocks import units_of_regrouping
from kvframe.runtime.layer import RetrievalLayer, host_bytes_needed

__all__ = ["RetrievalLayer", "host_bytes_needed", "units_of_regrouping"]
