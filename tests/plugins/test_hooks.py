"""The typed methods around the five hooks."""

from types import ModuleType
from typing import Any

import pytest

from kvframe import hookspecs
from kvframe.errors import PluginError, PluginLoadError
from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe.plugins import HOOKS, Plugins, create_plugin_manager
from kvframe.stages import EveryStep


def load(**functions: Any) -> Plugins:
    """kvframe's own plugin, and for each keyword `name__hook` a hook of a plugin `name`."""
    modules: dict[str, ModuleType] = {}
    for key, function in functions.items():
        name, _, hook = key.partition("__")
        module = modules.setdefault(name, ModuleType(name))
        vars(module).update({"KVFRAME_API_VERSION": 1, f"kvframe_{hook}": hookimpl(function)})
    return create_plugin_manager(modules.values(), autoload=False)


def test_the_five_hooks():
    """And no helper that happens to be in the module."""
    assert HOOKS == (
        "kvframe_stages",
        "kvframe_policies",
        "kvframe_check_policy",
        "kvframe_attention_backend",
        "kvframe_step_finished",
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_its_contract(hook: str):
    """A line for each argument, and for what it returns."""
    function = getattr(hookspecs, hook)
    arguments = [name for name in function.__annotations__ if name != "return"]

    assert all(f":param {name}:" in function.__doc__ for name in arguments)
    assert function.__annotations__["return"] == "None" or ":return:" in function.__doc__


class TestSpecs:
    """What a spec says of itself."""

    def test_stage_spec_reads_its_class(self):
        """What the class says need not be said again."""
        spec = StageSpec(EveryStep)

        assert (spec.slot, spec.name, spec.paper) == ("trigger", "every-step", None)
        assert (EveryStep.__doc__ or "").splitlines()[0] == spec.summary

    def test_policy_spec_reads_its_config(self):
        """So that a policy without a summary is listed with one."""

        class Config:
            """One line.

            And more.
            """

        assert PolicySpec(name="x", config_cls=Config, build=lambda config: None).summary == "One line."

    def test_class_without_docstring(self):
        """An empty summary, not an error."""

        class Config: ...

        assert PolicySpec(name="x", config_cls=Config, build=lambda config: None).summary == ""


class TestStagesAndPolicies:
    """Answers are collected and known by their plugin."""

    def test_specs_come_with_their_plugin(self):
        """Also from a generator."""

        def stages():
            yield StageSpec(EveryStep)

        record, spec = load(mine__stages=stages).stages()[-1]

        assert ("mine", EveryStep) == (record.name, spec.stage)

    @pytest.mark.parametrize("hook, expected", [("stages", "StageSpec"), ("policies", "PolicySpec")])
    def test_something_else_than_a_spec(self, hook: str, expected: str):
        """Named with the plugin that offers it."""
        plugins = load(**{f"mine__{hook}": lambda: [EveryStep]})

        with pytest.raises(
            PluginError, match=rf"'mine' from the caller: kvframe_{hook} offers .*, expected a {expected}"
        ):
            getattr(plugins, hook)()

    @pytest.mark.parametrize("returned", [None, StageSpec(EveryStep), "every-step"])
    def test_no_iterable(self, returned: object):
        """A forgotten `return`, or forgotten brackets."""
        with pytest.raises(PluginError, match=r"kvframe_stages returned .*, expected an iterable of StageSpec"):
            load(mine__stages=lambda: returned).stages()

    def test_failing_hook(self):
        """The traceback alone does not say whose code it is."""

        def stages():
            yield StageSpec(EveryStep)
            raise ValueError("broken")

        with pytest.raises(PluginError, match="'mine' from the caller: kvframe_stages failed: ValueError: broken"):
            load(mine__stages=stages).stages()

    def test_failing_import_in_a_hook(self):
        """Plugins import late, as kvframe does."""

        def policies():
            import no_such_module  # noqa: F401

        with pytest.raises(PluginLoadError, match="kvframe_policies failed: ModuleNotFoundError"):
            load(mine__policies=policies).policies()


class TestCheckPolicy:
    """All plugins are asked."""

    def test_all_problems_are_collected(self):
        """In the order of loading, each with whose it is."""
        plugins = load(
            a__check_policy=lambda policy, layout: [f"{policy} is too slow", f"{layout} is too small"],
            b__check_policy=lambda layout: None,
            c__check_policy=lambda: ["never"],
        )

        assert plugins.check_policy("p", "l") == [
            "p is too slow (says plugin 'a' from the caller)",
            "l is too small (says plugin 'a' from the caller)",
            "never (says plugin 'c' from the caller)",
        ]

    @pytest.mark.parametrize("returned", ["too slow", 3])
    def test_no_list(self, returned: object):
        """A string would be taken apart into letters."""
        with pytest.raises(PluginError, match=r"kvframe_check_policy returned .*, expected an iterable of str"):
            load(mine__check_policy=lambda: returned).check_policy(None, None)

    def test_no_strings(self):
        """Problems are sentences."""
        with pytest.raises(PluginError, match="kvframe_check_policy offers 3, expected a str"):
            load(mine__check_policy=lambda: [3]).check_policy(None, None)


class TestAttentionBackend:
    """One plugin answers."""

    def test_nobody_offers_one(self):
        """kvframe's own kernels run then."""
        assert load().attention_backend(None, None) is None

    def test_first_answer_wins(self):
        """The plugin loaded last is asked first; one that declines is passed over."""
        plugins = load(
            a__attention_backend=lambda: pytest.fail("asked although there was an answer"),
            b__attention_backend=lambda layout, device: (layout, device),
            c__attention_backend=lambda layout: None,
        )

        assert plugins.attention_backend("l", "d") == ("l", "d")


class TestStepFinished:
    """Observers."""

    def test_observers_are_told(self):
        """All of them."""
        seen: list[str] = []
        plugins = load(
            a__step_finished=lambda stats: seen.append(f"a {stats}"), b__step_finished=lambda stats: seen.append("b")
        )

        plugins.step_finished("s")

        assert plugins.has_observers
        assert sorted(seen) == ["a s", "b"]

    def test_nobody_observes(self):
        """The run can then skip the call."""
        assert not load().has_observers
