"""The calls that check a policy, a stage, or everything that a plugin brings."""

import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyFailure, Unsatisfiable
from hypothesis.strategies import SearchStrategy

from kvframe.composition import Policy
from kvframe.errors import ConfigError, UnknownNameError
from kvframe.plugins import create_plugin_manager
from kvframe.registry import PolicyRecord, Registry, StageRecord, default_registry
from kvframe.stages import SLOTS, Slot, Stage
from kvframe.suggest import hint
from kvframe.testing.blame import blame
from kvframe.testing.broken import Broken
from kvframe.testing.cases import Case
from kvframe.testing.promises import Promise, all_promises
from kvframe.testing.strategies import cases, options, undrawn, variants
from kvframe.types import Execution

Options = Mapping[str, SearchStrategy[Any]]
"""Strategies by the name of an option, for options that the kit does not know or should draw otherwise."""

_USUAL = {"max_turns": 2, "max_prompt": 40, "max_steps": 12}
_SMALL = {"max_turns": 2, "max_prompt": 30, "max_steps": 6}
# Refusals until nothing is hoped for any more, if all that was drawn has been refused.
_PATIENCE = 50
# Runs that are spent on making a failing example smaller.
_SHRINK_RUNS = 40


@frozen(kw_only=True)
class Failure:
    """A promise that is not kept, and the smallest example found of it."""

    promise: Promise
    policy: Policy
    case: Case
    execution: Execution
    error: Exception
    blamed: str
    """Who breaks it, as far as that can be told."""
    is_flaky: bool = False
    """Whether the same example failed at one time and not at another."""

    def __str__(self) -> str:
        seen = str(self.error) if isinstance(self.error, Broken) else _with_place(self.error)
        if self.is_flaky:
            seen += " (not every time: something in it is not deterministic)"
        shown = [
            f"broken promise: {self.promise.text} ({self.promise.name})",
            f"  by    {self.blamed}",
            f"  seen  {seen}",
            f"  in    {_shown(self.case)}, execution={self.execution!r}",
            *(f"        {line}" for line in str(self.policy).splitlines()),
        ]
        return "\n".join(shown)


class ConformanceError(AssertionError):
    """Promises that are not kept; `failures` has one for each."""

    def __init__(self, subject: str, failures: Collection[Failure]) -> None:
        self.failures = tuple(failures)
        super().__init__("\n\n".join([f"{subject} does not keep what it promises", *map(str, self.failures)]))


@frozen(kw_only=True)
class Outcome:
    """What became of one promise."""

    promise: Promise
    examples: int
    """Runs in which it was kept."""
    refused: int
    """Drawn compositions that were refused, with a ConfigError, and so not run."""

    def __str__(self) -> str:
        kept = f"kept in {self.examples} examples" if self.examples else "not promised"
        return f"{self.promise.name:<26} {kept}{f', {self.refused} refused' if self.refused else ''}"


@frozen(kw_only=True)
class Summary:
    """What was checked."""

    subject: str
    outcomes: tuple[Outcome, ...]
    undrawn: tuple[str, ...]
    """Options that were left at their defaults, for want of a strategy."""

    def __str__(self) -> str:
        lines = [self.subject, *(f"  {outcome}" for outcome in self.outcomes)]
        if self.undrawn:
            lines.append(f"  left at their defaults: {', '.join(self.undrawn)}; options={{name: strategy}} varies them")
        return "\n".join(lines)


def check_policy(
    policy: str | Policy,
    *,
    options: Options | None = None,
    only: Collection[str] = (),
    case: Case | None = None,
    registry: Registry | None = None,
    max_examples: int | None = None,
) -> Summary:
    """Check that a policy keeps what it promises; see `docs/testing.md`.

    policy: the name of a registered one, which is checked with many options, or a policy as it is.
    options: strategies for options, before those that the kit has by name and by annotation.
    only: names of promises; all of them unless given.
    case: what to run, instead of many drawn ones: to see a failure again.
    registry: where names are looked up; the installed plugins unless given.
    max_examples: runs for each promise; a fifth of those of hypothesis's current profile unless given.

    Raises ConformanceError with every promise that is not kept, ConfigError where nothing could be run.
    """
    registry = registry or default_registry()
    if isinstance(policy, Policy):
        _require_known_options(options, {})
        made: SearchStrategy[Callable[[], Policy]] = st.just(lambda: policy)
        return _check(f"policy {policy.name!r}", made, (), only, case, registry, max_examples)
    record = registry.policy_spec(policy)
    _require_known_options(options, {record.name: record.config_cls})
    left = undrawn(record.config_cls, options)
    made = _policies(record, options, registry)
    return _check(f"policy {policy!r}", made, left, only, case, registry, max_examples, by_name=True)


def check_stage(
    stage: type[Stage] | Stage,
    *,
    options: Options | None = None,
    only: Collection[str] = (),
    case: Case | None = None,
    registry: Registry | None = None,
    max_examples: int | None = None,
) -> Summary:
    """Check a stage within LouisKV, and within LouisKV with the core's stages in the other slots.

    stage: a class, which is checked with many options, or a stage as it is. The other arguments are those of
    `check_policy`, which also says what is raised.
    """
    registry = registry or default_registry()
    if isinstance(stage, Stage):
        _require_known_options(options, {})
        drawn: SearchStrategy[Callable[[], Stage]] = st.just(lambda: stage)
        cls: type[Stage] = type(stage)
        left: tuple[str, ...] = ()
    else:
        _require_known_options(options, {stage.__name__: stage})
        drawn, cls, left = _stages(stage, options, registry), stage, undrawn(stage, options)
    subject = f"{cls.slot} {cls.__name__}"
    return _check(subject, _around(cls.slot, drawn, registry), left, only, case, registry, max_examples)


def check_plugin(
    name: str,
    *,
    options: Options | None = None,
    registry: Registry | None = None,
    max_examples: int | None = None,
) -> tuple[Summary, ...]:
    """Check every policy and every stage of an installed plugin.

    name: that of its entry point, as `kvframe list` shows it. The other arguments are those of `check_policy`.

    Raises UnknownNameError for a plugin that is not there, ConformanceError with all broken promises, PluginError where
    the plugin cannot be loaded.
    """
    registry = registry or Registry(create_plugin_manager())
    known = [record.name for record in registry.plugins.records]
    if name not in known:
        raise UnknownNameError(f"no plugin named {name!r}{hint(name, known)}")
    policies = [record for record in registry.policies() if record.plugin.name == name]
    own = [record for record in registry.stages() if record.plugin.name == name]
    if not policies and not own:
        raise ConfigError(f"plugin {name!r} brings neither stages nor policies, so there is nothing to check")
    _require_known_options(
        options,
        {record.name: record.config_cls for record in policies} | {record.name: record.stage for record in own},
    )
    summaries: list[Summary] = []
    failures: list[Failure] = []
    checks = [partial(check_policy, record.name, options=_of(record.config_cls, options)) for record in policies]
    checks += [partial(check_stage, record.stage, options=_of(record.stage, options)) for record in own]
    for check in checks:
        try:
            summaries.append(check(registry=registry, max_examples=max_examples))
        except ConformanceError as error:
            failures += error.failures
    if failures:
        raise ConformanceError(f"plugin {name!r}", failures)
    return tuple(summaries)


# ---- what is drawn --------------------------------------------------------------------------------------------------


def _policies(record: PolicyRecord, own: Options | None, registry: Registry) -> SearchStrategy[Callable[[], Policy]]:
    return options(record.config_cls, own, registry).map(lambda drawn: partial(record.make, **drawn))


def _stages(stage: type[Stage], own: Options | None, registry: Registry) -> SearchStrategy[Callable[[], Stage]]:
    return options(stage, own, registry).map(lambda drawn: partial(stage, **drawn))


def _around(
    slot: Slot, drawn: SearchStrategy[Callable[[], Stage]], registry: Registry
) -> SearchStrategy[Callable[[], Policy]]:
    """LouisKV with a stage in its slot, and perhaps the core's own in others."""
    louiskv = variants(registry.policy_spec("louiskv"))
    others = {
        other: _core_stages([record for record in registry.stages(other) if record.plugin.name == "core"], registry)
        for other in SLOTS
        if other not in (slot, "transfer")
    }

    def make(policy: Policy, stage: Callable[[], Stage], changes: dict[str, Stage]) -> Callable[[], Policy]:
        return lambda: policy.swap(**{**changes, slot: stage()})

    return st.builds(make, louiskv, drawn, st.fixed_dictionaries({}, optional=others))


def _core_stages(records: list[StageRecord], registry: Registry) -> SearchStrategy[Stage]:
    return st.sampled_from(records).flatmap(
        lambda record: options(record.stage, None, registry).map(lambda drawn: record.make(**drawn))
    )


def _require_known_options(given: Options | None, classes: Mapping[str, type[Any]]) -> None:
    known = [field.alias for cls in classes.values() for field in attrs.fields(cls) if field.init]
    for name in given or ():
        if name not in known:
            owners = ", ".join(classes) or "what is checked as it is"
            raise ConfigError(f"options has {name!r}, which {owners} has not{hint(name, known, 'options')}")


def _of(cls: type[Any], given: Options | None) -> Options:
    """Those strategies that are for options of a class."""
    names = {field.alias for field in attrs.fields(cls)}
    return {name: strategy for name, strategy in (given or {}).items() if name in names}


# ---- the examples ---------------------------------------------------------------------------------------------------


def _check(
    subject: str,
    policies: SearchStrategy[Callable[[], Policy]],
    left: tuple[str, ...],
    only: Collection[str],
    case: Case | None,
    registry: Registry,
    max_examples: int | None,
    *,
    by_name: bool = False,
) -> Summary:
    outcomes: list[Outcome] = []
    failures: list[Failure] = []
    for promise in _chosen(only, registry, by_name):
        found = _examine(subject, promise, policies, case, max_examples)
        if isinstance(found, Outcome):
            outcomes.append(found)
        else:
            failures.append(found)
            if promise.is_basic:
                break  # what else is broken would only follow from it
    if failures:
        raise ConformanceError(subject, failures)
    return Summary(subject=subject, outcomes=tuple(outcomes), undrawn=left)


def _chosen(only: Collection[str], registry: Registry, by_name: bool) -> Iterator[Promise]:
    promises = all_promises(registry, by_name=by_name)
    known = [promise.name for promise in promises]
    for name in only:
        if name not in known:
            raise UnknownNameError(f"no promise named {name!r}{hint(name, known)}")
    yield from (promise for promise in promises if not only or promise.name in only)


class _Examples:
    """The runs of one promise: what was kept, not promised or refused, and the smallest that failed."""

    def __init__(self, promise: Promise) -> None:
        self.promise = promise
        self.kept = self.waived = self.refused = self._runs_since = 0
        self.refusal: ConfigError | None = None
        self.failed: tuple[Policy, Case, Execution, Exception] | None = None

    def run(self, make: Callable[[], Policy], case: Case, execution: Execution) -> None:
        """One of them; raises what the check raises."""
        try:
            policy = make()
            if not self.promise.applies(policy):
                self.waived += 1
                return
            case.layer(policy, execution)
        except ConfigError as refusal:
            self._refuse(refusal)
            return
        if self.failed is not None:
            self._runs_since += 1
            if self._runs_since > _SHRINK_RUNS and self.failed[:3] != (policy, case, execution):
                return  # small enough: only the smallest goes on to fail
        try:
            self.promise.keep(policy, case, execution)
        except ConfigError as refusal:  # by a plugin's kvframe_check_policy, or in a composition that the check makes
            self._refuse(refusal)
            return
        except Exception as error:
            self.failed = policy, case, execution, error
            raise
        self.kept += 1

    def _refuse(self, refusal: ConfigError) -> None:
        self.refused += 1
        self.refusal = refusal
        if self.kept or self.waived or self.refused < _PATIENCE:
            reject()  # another one is drawn in its place


def _examine(
    subject: str,
    promise: Promise,
    policies: SearchStrategy[Callable[[], Policy]],
    case: Case | None,
    max_examples: int | None,
) -> Outcome | Failure:
    """Run the examples of one promise."""
    examples = _Examples(promise)
    limits = _SMALL if promise.is_small else _USUAL
    executions: tuple[Execution, ...] = ("dense", "offload") if promise.by_execution else ("offload",)

    @settings(
        max_examples=max(1, round((max_examples or settings().max_examples / 5) * promise.share)),
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(
        make=policies,
        case=cases(**limits) if case is None else st.just(case),
        execution=st.sampled_from(executions),
    )
    def run(make: Callable[[], Policy], case: Case, execution: Execution) -> None:
        examples.run(make, case, execution)

    is_flaky = False
    try:
        run()
    except FlakyFailure:
        is_flaky = True
    except Unsatisfiable:
        pass  # told below, with a refusal
    except Exception:
        if examples.failed is None:  # an error of a strategy, not of what is checked
            raise
    if examples.failed is None and examples.refused and not (examples.kept or examples.waived):
        refusal = " ".join(str(examples.refusal).split())
        raise ConfigError(
            f"{subject}: none of {examples.refused} drawn compositions was accepted, the last one refused with "
            f"'{refusal}'; give strategies for its options, options={{name: strategy}}"
        ) from examples.refusal
    if examples.failed is None:
        return Outcome(promise=promise, examples=examples.kept, refused=examples.refused)
    policy, smallest, execution, error = examples.failed
    return Failure(
        promise=promise,
        policy=policy,
        case=smallest,
        execution=execution,
        error=error,
        blamed=blame(promise, policy, smallest, execution, error),
        is_flaky=is_flaky,
    )


def _with_place(error: Exception) -> str:
    """An error that no check raised, and the line of code that did."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno} in {place.name}"
    return f"{type(error).__name__}: {error}".rstrip(": ") + f" ({where}: {place.line})"


def _shown(case: Case) -> str:
    """A case as it is written, without what it has by default."""
    fields = [field for field in attrs.fields(Case) if getattr(case, field.name) != field.default]
    return f"Case({', '.join(f'{field.name}={getattr(case, field.name)!r}' for field in fields)})"
