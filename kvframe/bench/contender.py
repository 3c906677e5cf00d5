"""Who takes part in a decode benchmark: `louiskv`, `louiskv@1+compile`, `louiskv-plus:bits=2`, `dynamic-cache`."""

from typing import Any

from attrs import frozen

from kvframe.bench.forced import force
from kvframe.composition import Policy
from kvframe.errors import ConfigError
from kvframe.options import option_names, parse_options
from kvframe.stages import EveryStep

STOCK = ("dynamic-cache", "offloaded-cache")


@frozen(kw_only=True)
class Contender:
    """One of those compared."""

    label: str
    """As it was written."""
    name: str
    options: tuple[str, ...] = ()
    """Of the policy, written as `:OPTION=VALUE` behind the name."""
    fire_rate: float | None = None
    """Its own, written as `@RATE`; None for that of the benchmark."""
    compile: bool = False
    """Written as `+compile`."""

    @property
    def is_stock(self) -> bool:
        """Whether it is a cache of transformers."""
        return self.name in STOCK


def parse_contenders(text: str, *, compile: bool) -> list[Contender]:
    """The contenders of a list separated by commas; `compile` sets it for all policies.

    Raises ConfigError for a rate outside [0, 1], a name that comes twice, or an empty list.
    """
    found: dict[str, Contender] = {}
    for label in (part.strip() for part in text.split(",")):
        if not label:
            continue
        body, _, suffix = label.partition("+")
        head, _, rate = body.partition("@")
        name, *options = head.split(":")
        if suffix not in ("", "compile"):
            raise ConfigError(
                f"--policies: {label!r} ends in +{suffix}; expected NAME, NAME:OPTION=VALUE, NAME@RATE or NAME+compile"
            )
        if label in found:
            raise ConfigError(f"--policies names {label!r} twice")
        found[label] = Contender(
            label=label,
            name=name,
            options=tuple(options),
            fire_rate=_rate(label, rate) if rate else None,
            compile=name not in STOCK and (compile or suffix == "compile"),
        )
    if not found:
        raise ConfigError(f"--policies names nobody; expected names of policies, or of {' and '.join(STOCK)}")
    return list(found.values())


def _rate(label: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ConfigError(f"--policies: {label!r} has the rate {text!r}; expected a number from 0 to 1")
    return rate


@frozen(kw_only=True)
class Sizes:
    """What every policy of a benchmark is given, where it has the option."""

    sink_size: int = 64
    token_budget: int = 1024
    window_size: int = 256
    dense_layers: tuple[int, ...] = (0, 1)


def make_policy(
    contender: Contender, sizes: Sizes, attended: int, *, fire_rate: float, miss: float, page_miss: float, steps: int
) -> Policy:
    """The policy of a contender, with its schedule forced where it retrieves.

    attended: tokens that a policy without retrieval shall attend to, in sinks and window.
    miss, page_miss: share of a selection that is not resident, for policies that select now and then and at every step.
    steps: length of the schedule.

    Raises UnknownNameError for a name that no plugin brings, ConfigError for an option that the policy does not take.
    """
    policy = policy_by_name(contender.name, sizes, contender.options)
    if policy.dense_layers == "all":
        return policy
    if policy.selector.capacity == 0:
        return policy.swap(window_size=attended - policy.sink_size)
    rate = fire_rate if contender.fire_rate is None else contender.fire_rate
    if isinstance(policy.trigger, EveryStep):
        rate, miss = 1.0, page_miss
    return force(policy, fire_rate=rate, miss=miss, num_steps=steps)


def policy_by_name(name: str, sizes: Sizes, options: tuple[str, ...] = ()) -> Policy:
    """A registered policy in these sizes, and with options written as OPTION=VALUE.

    Raises UnknownNameError for a name that no plugin brings, ConfigError for an option that the policy does not take.
    """
    from kvframe.registry import default_registry

    record = default_registry().policy_spec(name)
    wanted: dict[str, Any] = {
        "sink_size": sizes.sink_size,
        "token_budget": sizes.token_budget,
        "window_size": sizes.window_size,
        "dense_layers": sizes.dense_layers,
    }
    known = option_names(record.config_cls)
    own = {option: value for option, value in wanted.items() if option in known}
    return record.make(**own | parse_options(record.config_cls, options))
