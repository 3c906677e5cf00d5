"""What a plugin can extend: five hooks, and the specs that they return.

Hooks are asked while a policy is being composed; decoding calls stages directly. A plugin is a module that states
`KVFRAME_API_VERSION`, marks its implementations with `hookimpl`, and is named in the entry-point group `kvframe`:

    KVFRAME_API_VERSION = 1

    @hookimpl
    def kvframe_stages():
        return [StageSpec(MyScorer, paper="arXiv 2406.10774")]

An implementation may accept fewer arguments than its hook has, so a hook grows by adding arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import pluggy
from attrs import Factory, field, frozen

if TYPE_CHECKING:
    import torch

    from kvframe.composition import Policy
    from kvframe.stages.base import Stage
    from kvframe.types import LayerLayout, ModelLayout

PROJECT = "kvframe"
API_VERSION = 1
"""What a plugin's `KVFRAME_API_VERSION` has to equal. Raised when an existing plugin would break."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


def _first_line(described: type) -> str:
    return (described.__doc__ or "").strip().partition("\n")[0]


@frozen
class StageSpec:
    """A stage that a plugin offers. Slot and name are the class's own."""

    stage: type[Stage]
    """A final class: concrete, and `attrs.frozen(kw_only=True)`."""
    summary: str = field(kw_only=True, default=Factory(lambda spec: _first_line(spec.stage), takes_self=True))
    """One line for `kvframe list`; by default the first line of the class's docstring."""
    paper: str | None = field(kw_only=True, default=None)
    """Where it was published, such as "arXiv 2510.11292"."""

    @property
    def slot(self) -> str:
        """The slot that the stage belongs to."""
        return self.stage.slot

    @property
    def name(self) -> str:
        """The stage's name, unique in its slot."""
        return self.stage.name


@frozen(kw_only=True)
class PolicySpec:
    """A policy that a plugin offers: flat options, and how they become a stage in every slot."""

    name: str
    """Unique; lower-case words joined by `-` or `_`."""
    config_cls: type[Any]
    """An attrs class; its fields are what `kvframe.policy(name, ...)` and `kvframe ... --set key=value` accept."""
    build: Callable[[Any], Policy]
    """Called with an instance of `config_cls`."""
    summary: str = Factory(lambda spec: _first_line(spec.config_cls), takes_self=True)
    """One line for `kvframe list`; by default the first line of the config class's docstring."""
    paper: str | None = None
    """Where it was published, such as "arXiv 2510.11292"."""
    title: str | None = None
    """The paper's title."""
    year: int | None = None
    """When it was first published."""


@hookspec
def kvframe_stages() -> Iterable[StageSpec]:
    """Stages that this plugin offers. Asked once for every registry.

    :return: One spec a stage. A name that its slot already has is an error, never a replacement.
    """
    raise NotImplementedError


@hookspec
def kvframe_policies() -> Iterable[PolicySpec]:
    """Policies that this plugin offers. Asked once for every registry.

    :return: One spec a policy. A name that is already taken is an error, never a replacement.
    """
    raise NotImplementedError


@hookspec
def kvframe_check_policy(policy: Policy, layout: ModelLayout) -> list[str] | None:
    """Problems that this plugin sees in a composed policy, for instance stages of its own that do not go together.

    Asked before a policy is attached. The problems of all plugins are shown together.

    :param policy: The policy, complete.
    :param layout: What is known of the model before its first forward pass.
    :return: A sentence a problem, with the way out; an empty list or None where there is none.
    """
    raise NotImplementedError


@hookspec(firstresult=True)
def kvframe_attention_backend(layout: LayerLayout, device: torch.device) -> Any | None:
    """Attention over the slots of a layer, by other kernels than kvframe's own.

    Asked once a layer, not in the decode loop. The first answer wins; plugins are asked in the reverse order of their
    loading, unless an implementation says `tryfirst` or `trylast`.

    :param layout: Shape and placement of the layer.
    :param device: Where attention runs.
    :return: A callable that takes and returns what `kvframe_kernels.slot_attention.slot_attention` does, or None to
        decline.
    """
    raise NotImplementedError


@hookspec
def kvframe_step_finished(stats: Any) -> None:
    """A decode step of the whole model is over. For observers; called only where somebody implements it.

    Reading a device tensor here makes the host wait for the device in every step.

    :param stats: The counters of the run so far.
    """
