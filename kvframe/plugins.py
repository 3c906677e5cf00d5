"""How plugins are found, and how they are asked.

`create_plugin_manager` builds a fresh `Plugins` every time; there is no global one. A build either succeeds or raises,
and what was built until then is thrown away.
"""

import importlib
import importlib.metadata
import inspect
import os
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from attrs import asdict, evolve, frozen

from kvframe import hookspecs
from kvframe.errors import PluginConflictError, PluginError, PluginLoadError, PluginVersionError
from kvframe.hookspecs import API_VERSION, PROJECT, PolicySpec, StageSpec
from kvframe.suggest import hint

if TYPE_CHECKING:
    import torch

    from kvframe.composition import Policy
    from kvframe.types import LayerLayout, ModelLayout

GROUP = "kvframe"
"""The entry-point group that names plugin modules."""
DISABLE_VARIABLE = "KVFRAME_DISABLE_PLUGINS"
"""Environment variable: names of plugins not to load, separated by commas."""
BUILTIN_NAME, BUILTIN_MODULE = "core", "kvframe.builtin"

HOOKS: tuple[str, ...] = tuple(name for name, value in vars(hookspecs).items() if hasattr(value, f"{PROJECT}_spec"))
# Asked plugin by plugin, so that every answer is known by its plugin; a wrapper would have nothing to wrap.
_COLLECTED = frozenset({"kvframe_stages", "kvframe_policies", "kvframe_check_policy"})

_T = TypeVar("_T")


class PluginWarning(UserWarning):
    """A plugin, or the setting that blocks one, has no effect."""


@frozen(kw_only=True)
class PluginRecord:
    """Where a plugin comes from, and what it does."""

    name: str
    module: str
    distribution: str | None = None
    """None for a plugin that the caller passed."""
    version: str | None = None
    hooks: tuple[str, ...] = ()
    """The hooks it implements; empty for a plugin that was not loaded."""

    @property
    def origin(self) -> str:
        """The distribution with its version, such as `kv_quest 1.0`."""
        if self.distribution is None:
            return "the caller"
        return f"{self.distribution} {self.version or '(unknown version)'}"

    def __str__(self) -> str:
        return f"plugin {self.name!r} from {self.origin}"


class Plugins:
    """The plugins of one build, and a typed method for each hook."""

    def __init__(
        self, manager: pluggy.PluginManager, records: Iterable[PluginRecord], disabled: Iterable[PluginRecord]
    ) -> None:
        self._manager = manager
        self.records: tuple[PluginRecord, ...] = tuple(records)
        """Loaded plugins, in the order of loading."""
        self.disabled: tuple[PluginRecord, ...] = tuple(disabled)
        """Plugins that were found, and left out because `KVFRAME_DISABLE_PLUGINS` names them."""
        self.has_observers: bool = any("kvframe_step_finished" in record.hooks for record in self.records)
        """Does anybody implement `kvframe_step_finished`? Without, the caller need not gather its argument."""

    def stages(self) -> list[tuple[PluginRecord, StageSpec]]:
        """Every stage on offer, with the plugin that offers it."""
        return self._collect("kvframe_stages", StageSpec)

    def policies(self) -> list[tuple[PluginRecord, PolicySpec]]:
        """Every policy on offer, with the plugin that offers it."""
        return self._collect("kvframe_policies", PolicySpec)

    def check_policy(self, policy: "Policy", layout: "ModelLayout") -> list[str]:
        """The problems that all plugins see in `policy`; those of a guest say whose they are."""
        found = self._collect("kvframe_check_policy", str, policy=policy, layout=layout)
        return [problem if record.name == BUILTIN_NAME else f"{problem} (says {record})" for record, problem in found]

    def attention_backend(self, layout: "LayerLayout", device: "torch.device") -> Any | None:
        """The first attention backend on offer, or None."""
        return self._manager.hook.kvframe_attention_backend(layout=layout, device=device)

    def step_finished(self, stats: Any) -> None:
        """Tell observers that a decode step is over."""
        self._manager.hook.kvframe_step_finished(stats=stats)

    def describe(self) -> list[dict[str, Any]]:
        """A dict a plugin, loaded or disabled, fit for JSON: what `kvframe list` and bug reports print."""
        return [asdict(record) | {"enabled": True} for record in self.records] + [
            asdict(record) | {"enabled": False} for record in self.disabled
        ]

    def _collect(self, hook: str, kind: type[_T], **arguments: Any) -> list[tuple[PluginRecord, _T]]:
        by_name = {record.name: record for record in self.records}
        found: list[tuple[PluginRecord, _T]] = []
        for implementation in getattr(self._manager.hook, hook).get_hookimpls():
            record = by_name[implementation.plugin_name]
            with _blaming(record, hook):
                returned = implementation.function(*(arguments[name] for name in implementation.argnames))
            if returned is None and kind is str:
                continue
            if not isinstance(returned, Iterable) or isinstance(returned, str):
                raise PluginError(f"{record}: {hook} returned {returned!r}, expected an iterable of {kind.__name__}")
            with _blaming(record, hook):
                items = list(returned)  # a generator runs, and fails, only now
            for item in items:
                if not isinstance(item, kind):
                    raise PluginError(f"{record}: {hook} offers {item!r}, expected a {kind.__name__}")
                found.append((record, item))
        return found


def create_plugin_manager(plugins: Iterable[object] = (), *, autoload: bool = True) -> Plugins:
    """Load kvframe's own plugin, the installed ones and those passed here, in this order.

    Args:
        plugins: Modules or instances with hook implementations, besides those that are installed. One that is
            installed too is loaded once.
        autoload: Load what the entry-point group `kvframe` names, in the order of the names.

    Raises:
        PluginConflictError: Two plugins have one name, or one module has two.
        PluginLoadError: A plugin failed to import.
        PluginVersionError: A plugin was written for another version of the plugin API, or does not say for which.
        PluginError: A plugin implements a hook that does not exist, or with arguments that the hook does not have.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    candidates = [_builtin(), *(_installed() if autoload else ()), *map(_passed, plugins)]
    blocked = _blocked_names()
    enabled = [candidate for candidate in candidates if candidate.record.name not in blocked]
    disabled = [candidate.record for candidate in candidates if candidate.record.name in blocked]
    if autoload:
        _warn_of_unused(blocked, [candidate.record.name for candidate in candidates])
    _refuse_shared_names([candidate.record for candidate in enabled])
    records: list[PluginRecord] = []
    for candidate in enabled:
        record = _register(manager, candidate)
        if record is not None:
            records.append(record)
    manager.check_pending()
    return Plugins(manager, records, disabled)


@frozen
class _Candidate:
    record: PluginRecord
    load: Callable[[], object]


def _builtin() -> _Candidate:
    try:
        version = importlib.metadata.version("kvframe")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        version = None
    record = PluginRecord(name=BUILTIN_NAME, module=BUILTIN_MODULE, distribution="kvframe", version=version)
    return _Candidate(record, lambda: importlib.import_module(BUILTIN_MODULE))


def _installed() -> list[_Candidate]:
    # entry_points() keeps one copy of a distribution that is seen twice, through an egg-info in the working directory.
    found = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return [
        _Candidate(
            PluginRecord(
                name=point.name,
                module=point.value,
                distribution=point.dist.name if point.dist else "an unknown distribution",
                version=point.dist.version if point.dist else None,
            ),
            point.load,
        )
        for point in found
    ]


def _passed(plugin: object) -> _Candidate:
    if isinstance(plugin, types.ModuleType):
        record = PluginRecord(name=plugin.__name__, module=plugin.__name__)
    else:
        kind = plugin if isinstance(plugin, type) else type(plugin)
        record = PluginRecord(name=kind.__name__, module=kind.__module__)
    return _Candidate(record, lambda: plugin)


def _blocked_names() -> frozenset[str]:
    names = frozenset(filter(None, (name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(","))))
    if BUILTIN_NAME in names:
        raise PluginError(
            f"{DISABLE_VARIABLE} names {BUILTIN_NAME!r}, kvframe's own stages, which are always there; remove it"
        )
    return names


def _warn_of_unused(blocked: Iterable[str], names: Sequence[str]) -> None:
    for name in sorted(set(blocked).difference(names)):
        message = f"{DISABLE_VARIABLE} names {name!r}, but there is no such plugin{hint(name, names)}"
        warnings.warn(message, PluginWarning, stacklevel=3)


def _refuse_shared_names(records: Iterable[PluginRecord]) -> None:
    claims: defaultdict[str, list[PluginRecord]] = defaultdict(list)
    for record in records:
        claims[record.name].append(record)
    for name, claimants in claims.items():
        if len(claimants) > 1:
            origins = [record.origin for record in claimants]
            installed = all(record.distribution for record in claimants) and len(set(origins)) == len(origins)
            times = f"by {len(origins)} distributions" if installed else f"{len(origins)} times"
            where = ", ".join(f"{record.origin} ({record.module})" for record in claimants)
            raise PluginConflictError(
                f"plugin name {name!r} is claimed {times}: {where}; uninstall one, or block it with {DISABLE_VARIABLE}"
            )


def _register(manager: pluggy.PluginManager, candidate: _Candidate) -> PluginRecord | None:
    """Load and register one plugin; None for a passed one that is registered already."""
    record = candidate.record
    try:
        plugin = candidate.load()
    except Exception as error:
        raise PluginLoadError(
            f"{record} ({record.module}) failed to import: {type(error).__name__}: {error}; "
            f"repair or uninstall it, or block it with {DISABLE_VARIABLE}"
        ) from error
    if isinstance(plugin, type):
        raise PluginError(
            f"{record}: expected a module or an instance, got the class {plugin.__qualname__}; pass an instance"
        )
    registered = manager.get_name(plugin)
    if registered is not None:
        if record.distribution is None:
            return None
        raise PluginConflictError(
            f"{record} is {record.module}, which is plugin {registered!r} already; keep one of the two entry points"
        )
    _check_version(record, plugin)
    hooks = _implemented_hooks(manager, record, plugin)
    try:
        manager.register(plugin, name=record.name)
    except pluggy.PluginValidationError as error:
        expected = ", ".join(f"{hook}({', '.join(_parameters(hook))})" for hook in hooks)
        complaint = " ".join(str(error).split())  # pluggy's has several lines
        raise PluginError(f"{record} does not fit its hooks: {complaint}; expected {expected}") from error
    if not hooks:
        message = (
            f"{record} ({record.module}) implements no hook; "
            f"mark its functions with @kvframe.hookimpl (hooks: {', '.join(HOOKS)})"
        )
        warnings.warn(message, PluginWarning, stacklevel=3)
    return evolve(record, hooks=tuple(dict.fromkeys(hooks)))


def _check_version(record: PluginRecord, plugin: object) -> None:
    version = getattr(plugin, "KVFRAME_API_VERSION", None)
    if version is None:
        raise PluginVersionError(
            f"{record} does not say which plugin API it was written for; "
            f"write KVFRAME_API_VERSION = {API_VERSION} into {record.module}"
        )
    if version != API_VERSION:
        raise PluginVersionError(
            f"{record} was written for plugin API {version!r}, this kvframe provides {API_VERSION}; "
            f"install a version of the plugin that fits, or block it with {DISABLE_VARIABLE}"
        )


def _implemented_hooks(manager: pluggy.PluginManager, record: PluginRecord, plugin: object) -> list[str]:
    hooks: list[str] = []
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            if attribute in HOOKS and not hasattr(inspect.getattr_static(plugin, attribute, None), f"{PROJECT}_spec"):
                raise PluginError(
                    f"{record} has a {attribute!r} that is not marked; write @kvframe.hookimpl above the function"
                )
            continue
        hook = options.get("specname") or attribute
        if hook in _COLLECTED and (options.get("wrapper") or options.get("hookwrapper")):
            raise PluginError(
                f"{record} wraps {hook!r}, which is asked plugin by plugin; return the plugin's own answer instead"
            )
        if hook in HOOKS:
            hooks.append(hook)
        elif not options.get("optionalhook"):
            raise PluginError(f"{record} implements unknown hook {hook!r}{hint(hook, HOOKS)}")
    return hooks


def _parameters(hook: str) -> Iterable[str]:
    return inspect.signature(getattr(hookspecs, hook)).parameters


@contextmanager
def _blaming(record: PluginRecord, hook: str) -> Iterator[None]:
    """Whatever goes wrong inside is told with the plugin's name."""
    try:
        yield
    except Exception as error:
        kind = PluginLoadError if isinstance(error, ImportError) else PluginError
        raise kind(f"{record}: {hook} failed: {type(error).__name__}: {error}") from error
