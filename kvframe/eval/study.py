"""A study: policies that differ in one thing each, on the same tasks, at the same budgets, with the same seeds."""

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen

from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.eval.budgets import token_budget, with_token_budget
from kvframe.eval.identity import cell_key, code_version, file_digest, model_identity
from kvframe.eval.tasks.base import Task
from kvframe.stages import Stage
from kvframe.suggest import hint
from kvframe.validators import integer, one_of

Kind = Literal["score", "watch"]
"""What a cell gives: the figures of a task, or the picture of one generation."""


@frozen(kw_only=True)
class Variant:
    """A policy of a study, before budgets are set."""

    label: str
    """What tables call it; unique in a study."""
    slot: str | None
    """The field in which it differs from the base; None for the base and for whole policies."""
    policy: Policy


@frozen(kw_only=True, eq=False)
class Cell:
    """The smallest piece of work: one policy, one task, one context, one budget, one seed."""

    key: str
    """Hash of everything that decides about the figures: two cells of one key have the same."""
    kind: Kind
    label: str
    """The variant's."""
    slot: str | None
    policy: Policy
    task: Any
    context: int
    budget: int | None
    """Tokens that the selector may take; None where the policy has no such setting."""
    seed: int
    model: str
    dtype: str
    haystack: str | None
    metrics: tuple[str, ...] | None
    watch: int
    """Tokens to generate, of a cell of kind "watch"."""

    @property
    def title(self) -> str:
        """One line for progress and errors."""
        budget = "" if self.budget is None else f" @{self.budget}"
        kind = " (timeline)" if self.kind == "watch" else ""
        return f"{self.label}{budget}, {self.task.name}, {self.context} tokens, seed {self.seed}{kind}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what the results file keeps of it."""
        return {
            "kind": self.kind,
            "label": self.label,
            "slot": self.slot,
            "policy": self.policy.to_dict(),
            "task": task_to_dict(self.task),
            "context": self.context,
            "budget": self.budget,
            "seed": self.seed,
            "model": Path(self.model).name,
            "dtype": self.dtype,
            "haystack": None if self.haystack is None else Path(self.haystack).name,
            "metrics": None if self.metrics is None else list(self.metrics),
        }


def _to_tuple(value: Any) -> Any:
    """A single value as a tuple of one."""
    return tuple(value) if isinstance(value, Sequence | range) and not isinstance(value, str) else (value,)


def _to_optional_tuple(value: Any) -> Any:
    return None if value is None else _to_tuple(value)


def _to_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _whole_numbers(*, at_least: int) -> Any:
    def check(study: "Study", attribute: Any, values: tuple[Any, ...]) -> None:
        for value in values:
            if type(value) is not int or value < at_least:
                raise ConfigError(f"Study.{attribute.name} must be whole numbers >= {at_least}, got {value!r}")
        if len(set(values)) < len(values):
            raise ConfigError(f"Study.{attribute.name} has a number twice: {values}")

    return check


def _not_empty(study: "Study", attribute: Any, values: tuple[Any, ...]) -> None:
    if not values:
        raise ConfigError(f"Study.{attribute.name} is empty; expected at least one")


@frozen(kw_only=True)
class Study:
    """What shall be compared with what.

    The base as it is; for every stage in `vary`, the base with that one stage exchanged; and the whole `policies`. Each
    of them on every task, at every budget, with every seed. Nothing is run by making one.

    Raises ConfigError, before anything runs, for whatever cannot be run: a task that is none, a stage that does not fit
    its slot or a budget, two variants of one name; and UnknownNameError for a metric that there is not.
    """

    model: str = field(converter=_to_text)
    """A directory that `from_pretrained` reads, or a name on the hub."""
    tasks: tuple[Any, ...] = field(converter=_to_tuple, validator=_not_empty)
    """As `kvframe.eval.task(name, ...)` makes them."""
    base: Policy | None = None
    vary: Mapping[str, Sequence[Any]] = field(factory=dict)
    """For a slot, or a field of a policy such as `window_size`: what to put there, or (name, what)."""
    policies: tuple[Policy, ...] = field(default=(), converter=_to_tuple)
    token_budget: tuple[int, ...] = field(default=(), converter=_to_tuple, validator=_whole_numbers(at_least=1))
    """Budgets that the selector of every policy gets; without one, each keeps its own. A policy whose selector has no
    `token_budget`, such as `full`, runs once."""
    context: tuple[int, ...] = field(converter=_to_tuple, validator=[_not_empty, _whole_numbers(at_least=1)])
    """Prompt tokens; several make several cells."""
    seeds: tuple[int, ...] = field(
        default=(0,), converter=_to_tuple, validator=[_not_empty, _whole_numbers(at_least=0)]
    )
    haystack: str | None = field(default=None, converter=_to_text)
    """A text file that tasks hide things in; the standard library's documentation without."""
    metrics: tuple[str, ...] | None = field(default=None, converter=_to_optional_tuple)
    """What to measure; everything without."""
    dtype: str = field(default="auto", validator=one_of("auto", "float32", "bfloat16", "float16"))
    watch: int = field(default=96, validator=integer(at_least=0))
    """Tokens of the generation that the report draws for every variant; 0 for none."""
    title: str = "Study"
    """The report's heading."""

    @model.validator
    def _check_model(self, attribute: Any, value: object) -> None:
        if not isinstance(value, str) or not value:
            raise ConfigError(f"Study.model must be a directory or a name on the hub, got {value!r}")

    @tasks.validator
    def _check_tasks(self, attribute: Any, value: tuple[Any, ...]) -> None:
        for task in value:
            if not attrs.has(type(task)) or not isinstance(getattr(task, "name", None), str):
                raise ConfigError(f"Study.tasks takes tasks, got {task!r}; make one with kvframe.eval.task(name, ...)")
        if any(task in value[:place] for place, task in enumerate(value)):
            raise ConfigError("Study.tasks has a task twice; the same task with other options is another one")

    @metrics.validator
    def _check_metrics(self, attribute: Any, value: tuple[str, ...] | None) -> None:
        from kvframe.eval.metrics import check_metrics

        if value is not None:
            check_metrics(value)

    @haystack.validator
    def _check_haystack(self, attribute: Any, value: str | None) -> None:
        if value is not None and not Path(value).is_file():
            raise ConfigError(f"Study.haystack must be a text file; there is no file {value}")

    def __attrs_post_init__(self) -> None:
        if self.base is None and not self.policies:
            raise ConfigError("a study needs base=..., policies=[...], or both; kvframe.policy(name) makes a policy")
        if self.vary and self.base is None:
            raise ConfigError("Study.vary needs base=..., the policy that is varied")
        for policy in (*([] if self.base is None else [self.base]), *self.policies):
            if not isinstance(policy, Policy):
                raise ConfigError(f"expected a Policy, got {policy!r}; make one with kvframe.policy(name)")
        labels = [variant.label for variant in self.variants()]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(
                    f"two variants are called {label!r}; name one in vary as (name, stage), or a policy by "
                    "policy.swap(name=...)"
                )
        for variant in self.variants():
            list(self._budgets(variant))

    # ---- what it is made of -----------------------------------------------------------------------------------------

    def variants(self) -> tuple[Variant, ...]:
        """The base, the base with one thing exchanged each, and the whole policies, in this order."""
        found = [] if self.base is None else [Variant(label=self.base.name, slot=None, policy=self.base)]
        for name, choices in self.vary.items():
            found += [self._varied(name, choice) for choice in self._choices(name, choices)]
        found += [Variant(label=policy.name, slot=None, policy=policy) for policy in self.policies]
        return tuple(found)

    def _choices(self, name: str, choices: Any) -> Sequence[Any]:
        known = [attribute.name for attribute in attrs.fields(Policy) if attribute.name != "name"]
        if name not in known:
            raise ConfigError(f"Study.vary: a policy has no {name!r} to vary{hint(str(name), known)}")
        if isinstance(choices, str) or not isinstance(choices, Sequence | range):
            raise ConfigError(f"Study.vary[{name!r}] must be a list of what to put there, got {choices!r}")
        return choices

    def _varied(self, name: str, choice: Any) -> Variant:
        """The base with one field exchanged."""
        assert self.base is not None
        label = None
        if isinstance(choice, tuple) and len(choice) == 2 and isinstance(choice[0], str) and name != "dense_layers":
            label, choice = choice
        if label is None:
            label = f"{name}: {describe(choice)}"
        return Variant(label=label, slot=name, policy=self.base.swap(**{name: choice, "name": label}))

    def _budgets(self, variant: Variant) -> Iterator[tuple[int | None, Policy]]:
        """The policy at every budget of the study; one that has no budget comes once."""
        selector = variant.policy.selector
        own = token_budget(selector)
        if own is None or not self.token_budget:
            yield own, variant.policy
            return
        for budget in self.token_budget:
            try:
                yield budget, variant.policy.swap(selector=with_token_budget(selector, budget))
            except ConfigError as error:
                raise ConfigError(f"{variant.label} cannot have token_budget={budget}: {error}") from error

    # ---- what there is to do ----------------------------------------------------------------------------------------

    def cells(self) -> tuple[Cell, ...]:
        """Everything there is to do, resolved, each key once; what shares a prompt stands together.

        Raises ConfigError where model or haystack cannot be read.
        """
        shared = {
            "model": model_identity(self.model),
            "dtype": self.dtype,
            # The text that is always there comes with Python, so it is another one under another Python.
            "haystack": platform.python_version() if self.haystack is None else file_digest(self.haystack),
            "metrics": None if self.metrics is None else sorted(self.metrics),
        }
        found: dict[str, Cell] = {}
        for cell in (*self._of_kind("score", shared), *self._of_kind("watch", shared)):
            found.setdefault(cell.key, cell)
        return tuple(found.values())

    def _of_kind(self, kind: Kind, shared: dict[str, Any]) -> Iterator[Cell]:
        is_watch = kind == "watch"
        if is_watch and not self.watch:
            return
        for task in self.tasks[:1] if is_watch else self.tasks:
            for context in self.context[:1] if is_watch else self.context:
                for seed in self.seeds[:1] if is_watch else self.seeds:
                    for variant in self.variants():
                        budgets = list(self._budgets(variant))
                        for budget, policy in budgets[-1:] if is_watch else budgets:
                            yield self._cell(kind, variant, policy, task, context, budget, seed, shared)

    def _cell(
        self,
        kind: Kind,
        variant: Variant,
        policy: Policy,
        task: Any,
        context: int,
        budget: int | None,
        seed: int,
        shared: dict[str, Any],
    ) -> Cell:
        key = cell_key(
            shared
            | {
                "kind": kind,
                "policy": policy.to_dict() | {"name": None},  # what it is called changes no figure
                "task": task_to_dict(task),
                "context": context,
                "seed": seed,
                "watch": self.watch if kind == "watch" else None,
                "code": code_version(policy, task),
            }
        )
        return Cell(
            key=key,
            kind=kind,
            label=variant.label,
            slot=variant.slot,
            policy=policy,
            task=task,
            context=context,
            budget=budget,
            seed=seed,
            model=self.model,
            dtype=self.dtype,
            haystack=self.haystack,
            metrics=self.metrics,
            watch=self.watch,
        )


def task_to_dict(task: Any) -> dict[str, Any]:
    """A task as plain data, of which no part says where a file lies."""
    return task.to_dict() if isinstance(task, Task) else {"task": task.name} | attrs.asdict(task)


def describe(choice: Any) -> str:
    """A stage by its name and those of its fields that are not as they come: `fixed-stride stride=16`."""
    if not isinstance(choice, Stage):
        return str(choice)
    changed = []
    for attribute in attrs.fields(type(choice)):  # type: ignore[arg-type]
        value = getattr(choice, attribute.name)
        default: Any = attribute.default
        if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
            default = attrs.NOTHING
        if value != default:
            changed.append(f"{attribute.name}={describe(value) if isinstance(value, Stage) else value}")
    return " ".join([choice.name, *changed])
