"""kvframe: KV retrieval for long-context decoding, as policies of five stages.

Importing this package loads neither transformers nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvframe.composition import Policy
from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry
from kvframe.stages import (
    ClusterUnits,
    DecoupledUnits,
    Drop,
    EstimateRest,
    EveryStep,
    FixedStride,
    HostPool,
    KeepOnDevice,
    MeanKey,
    MissedShare,
    Never,
    Once,
    PageUnits,
    QuantizedHostPool,
    RegroupedUnits,
    Scorer,
    SelectNothing,
    Selector,
    SketchRerank,
    TokenUnits,
    TopBudget,
    TopBytes,
    Transfer,
    Trigger,
    UnitBuilder,
)
from kvframe.types import (
    BlockInputs,
    Decision,
    Invariant,
    LayerLayout,
    LeavingUnits,
    ModelLayout,
    PromptInputs,
    Selection,
    StepInputs,
    Units,
    UnitTable,
)

if TYPE_CHECKING:
    from kvframe.calibration import calibrate
    from kvframe.hf import RetrievalCache, attach
    from kvframe.report import Report

__version__ = "0.1.0"

__all__ = [
    "BlockInputs",
    "ClusterUnits",
    "Decision",
    "DecoupledUnits",
    "Drop",
    "EstimateRest",
    "EveryStep",
    "FixedStride",
    "HostPool",
    "Invariant",
    "KeepOnDevice",
    "LayerLayout",
    "LeavingUnits",
    "MeanKey",
    "MissedShare",
    "ModelLayout",
    "Never",
    "Once",
    "PageUnits",
    "Policy",
    "PolicySpec",
    "PromptInputs",
    "QuantizedHostPool",
    "RegroupedUnits",
    "Registry",
    "Report",
    "RetrievalCache",
    "Scorer",
    "SelectNothing",
    "Selection",
    "Selector",
    "SketchRerank",
    "StageSpec",
    "StepInputs",
    "TokenUnits",
    "TopBudget",
    "TopBytes",
    "Transfer",
    "Trigger",
    "UnitBuilder",
    "UnitTable",
    "Units",
    "attach",
    "calibrate",
    "create_plugin_manager",
    "hookimpl",
    "policy",
]

# These need transformers, which is loaded when one of them is first asked for.
_LAZY = {
    "attach": "kvframe.hf",
    "RetrievalCache": "kvframe.hf",
    "Report": "kvframe.report",
    "calibrate": "kvframe.calibration",
}


def policy(name: str, /, **options: Any) -> Policy:
    """A policy by name, with its options.

    Raises UnknownNameError for a name that no plugin brings, ConfigError for an option or value that does not fit.
    """
    from kvframe.registry import default_registry

    return default_registry().make_policy(name, **options)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvframe' has no attribute {name!r}")
