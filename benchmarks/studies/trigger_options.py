"""The options of LouisKV's trigger that are looked at one by one, and what each is set to."""

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "tau per layer": {},
    "heads apart": {"heads": "kv-head"},
    "age": {"max_age": 32},
    "anchor": {"anchor": 0.0},
    "hysteresis": {"hysteresis": 0.02},
    "ahead": {"ahead": True},
}
"""By what they are called; "tau per layer" is a matter of how thresholds are found."""
