"""The core's own plugin: the trivial members of every slot."""

from collections.abc import Iterable

from kvframe.hookspecs import API_VERSION, StageSpec, hookimpl
from kvframe.stages import (
    DecoupledUnits,
    Drop,
    EstimateRest,
    EveryStep,
    FixedStride,
    HostPool,
    KeepOnDevice,
    MeanKey,
    Never,
    Once,
    PageUnits,
    QuantizedHostPool,
    SelectNothing,
    SketchRerank,
    TokenUnits,
    TopBudget,
    TopBytes,
)

KVFRAME_API_VERSION = API_VERSION


@hookimpl
def kvframe_stages() -> Iterable[StageSpec]:
    """Stages that need no paper."""
    stages = (
        EveryStep,
        FixedStride,
        Never,
        Once,
        TokenUnits,
        PageUnits,
        DecoupledUnits,
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
