"""The core's own plugin: members of every slot that no single paper owns."""

from collections.abc import Iterable

from kvframe.hookspecs import API_VERSION, StageSpec, hookimpl
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
    SelectNothing,
    SketchRerank,
    TokenUnits,
    TopBudget,
    TopBytes,
)

KVFRAME_API_VERSION = API_VERSION


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """Stages that belong to no one paper."""
    stages = (
        EveryStep,
        FixedStride,
        Never,
        Once,
        MissedShare,
        TokenUnits,
        PageUnits,
        ClusterUnits,
        DecoupledUnits,
        RegroupedUnits,
        MeanKey,
        TopBudget,
        TopBytes,
        SketchRerank,
        EstimateRest,
        SelectNothing,
        HostPool,
        QuantizedHostPool,
        KeepOnDevice,
        Drop,
    )
    return [StageSpec(stage) for stage in stages]
