"""What changes in a policy's stages while a layer runs."""

from typing import Any, Self

from attrs import define

from kvframe.composition import Policy
from kvframe.types import LayerLayout


@define(eq=False)
class StageStates:
    """The running state of those stages that have one; the stages themselves never change."""

    trigger: Any
    units: Any
    scorer: Any

    @classmethod
    def init(cls, policy: Policy, layout: LayerLayout) -> Self:
        """As before the first token."""
        return cls(
            trigger=policy.trigger.init(layout), units=policy.units.init(layout), scorer=policy.scorer.init(layout)
        )
