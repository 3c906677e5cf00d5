"""The core's own plugin: the trivial members of every slot."""

from collections.abc import Iterable

from kvframe.hookspecs import API_VERSION, StageSpec, hookimpl
from kvframe.stages import (
    DecoupledUnits,
    Drop,
    EveryStep,
    FixedStride,
    HostPool,
    KeepOnDevice,
    MeanKey,
    Never,
    Once,
    PageUnits,
    SelectNothing,
    TokenUnits,
    TopBudget,
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
        SelectNothing,
        HostPool,
        KeepOnDevice,
        Drop,
    )
    return [StageSpec(stage) for stage in stages]
