"""Stages and policies by name."""

import inspect
from types import ModuleType
from typing import Any

import attrs
import pytest
from attrs.validators import ge

from kvframe.composition import Policy
from kvframe.errors import ConfigError, KvframeError, NameConflictError, PluginError, UnknownNameError
from kvframe.hookspecs import PolicySpec, StageSpec, hookimpl
from kvframe.plugins import create_plugin_manager
from kvframe.registry import Registry, default_registry
from kvframe.stages import SLOTS, EveryStep, KeepOnDevice, MeanKey, PageUnits, Scorer, Stage, TopBudget


def stage(name: Any, base: type[Stage] = MeanKey, **attributes: Any) -> type[Stage]:
    """A final stage that does what `base` does."""
    return attrs.frozen(kw_only=True)(type("Sample", (base,), {"name": name, **attributes}))


@attrs.frozen(kw_only=True)
class PagedConfig:
    """Pages by their mean key."""

    token_budget: int = attrs.field(default=1024, validator=ge(1))
    page_size: int = attrs.field(default=16, validator=attrs.validators.instance_of(int))


def build_paged(config: PagedConfig) -> Policy:
    """The policy that the config describes."""
    return Policy(
        name="paged",
        trigger=EveryStep(),
        units=PageUnits(page_size=config.page_size),
        scorer=MeanKey(),
        selector=TopBudget(token_budget=config.token_budget),
        transfer=KeepOnDevice(),
    )


PAGED = PolicySpec(name="paged", config_cls=PagedConfig, build=build_paged, paper="arXiv 0000.00000")


def registry(*plugins: tuple[str, list[Any]]) -> Registry:
    """kvframe's own stages, and those of plugins given as (name, specs)."""
    modules = []
    for name, specs in plugins:
        module = ModuleType(name)
        stages = [spec for spec in specs if not isinstance(spec, PolicySpec)]
        policies = [spec for spec in specs if isinstance(spec, PolicySpec)]
        vars(module).update(
            KVFRAME_API_VERSION=1,
            kvframe_stages=hookimpl(lambda stages=stages: stages),
            kvframe_policies=hookimpl(lambda policies=policies: policies),
        )
        modules.append(module)
    return Registry(create_plugin_manager(modules, autoload=False))


class TestLookUp:
    """Finding a stage or policy, or what was meant."""

    def test_every_slot_has_a_stage_of_kvframe_itself(self):
        """A policy can be composed without any plugin."""
        own = registry()

        assert all(own.stages(slot) for slot in SLOTS)

    def test_record_knows_whose_it_is(self):
        """For `kvframe list`."""
        record = registry(("mine", [StageSpec(stage("digest"), summary="One line.", paper="arXiv 1")])).stage(
            "scorer", "digest"
        )

        assert (record.slot, record.name, record.summary, record.paper) == ("scorer", "digest", "One line.", "arXiv 1")
        assert (record.plugin.name, record.plugin.distribution, record.plugin.version) == ("mine", None, None)

    def test_own_stages_come_from_kvframe(self):
        """As every distribution's do."""
        plugin = registry().stage("scorer", "mean-key").plugin

        assert (plugin.name, plugin.distribution) == ("core", "kvframe")

    def test_stages_are_ordered_by_slot_and_name(self):
        """Whatever the order of loading was."""
        many = registry(("mine", [StageSpec(stage("zzz")), StageSpec(stage("aaa"))]))
        keys = [(SLOTS.index(record.slot), record.name) for record in many.stages()]

        assert sorted(keys) == keys
        assert [record for record in many.stages() if record.slot == "scorer"] == list(many.stages("scorer"))

    def test_one_name_in_two_slots_is_no_clash(self):
        """A stage is named within its slot."""
        both = registry(("mine", [StageSpec(stage("same")), StageSpec(stage("same", EveryStep))]))

        assert both.stage("scorer", "same") != both.stage("trigger", "same")

    def test_unknown_stage(self):
        """What was meant, and what there is."""
        with pytest.raises(UnknownNameError) as raised:
            registry(("mine", [StageSpec(stage("digest"))])).stage("scorer", "mean-keys")

        assert str(raised.value) == "no scorer named 'mean-keys'; did you mean 'mean-key'? (known: digest, mean-key)"

    @pytest.mark.parametrize("name", ["Mean_Key", "mean_key", "MEAN-KEY", "meankey"])
    def test_other_spellings_are_understood(self, name: str):
        """Only to suggest the right one: a policy on disk has one spelling."""
        with pytest.raises(UnknownNameError, match=r"did you mean 'mean-key'\?"):
            registry().stage("scorer", name)

    def test_name_of_another_slot(self):
        """Says which."""
        with pytest.raises(
            UnknownNameError,
            match=r"no scorer named 'every-step'; 'every-step' is a trigger \(known scorers: .*mean-key",
        ):
            registry().stage("scorer", "every-step")

    def test_unknown_slot(self):
        """Slots have names, too."""
        with pytest.raises(
            UnknownNameError, match=r"no slot named 'unit'; did you mean 'units'\? \(known: trigger, units,"
        ):
            registry().stage("unit", "pages")
        with pytest.raises(UnknownNameError, match="no slot named 'budget'"):
            registry().stages("budget")

    def test_unknown_policy(self):
        """As for stages."""
        with pytest.raises(UnknownNameError, match=r"no policy named 'page'; did you mean 'paged'\? \(known: .*paged"):
            registry(("mine", [PAGED])).make_policy("page")

    def test_disabled_plugin_is_mentioned(self, monkeypatch: pytest.MonkeyPatch):
        """The name may be one of its."""
        monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "mine")

        with pytest.raises(UnknownNameError, match=r"; KVFRAME_DISABLE_PLUGINS leaves out: mine$"):
            registry(("mine", [PAGED])).policy_spec("paged")

    @pytest.mark.parametrize("name", [None, 3, ["mean-key"]])
    def test_name_that_is_no_text(self, name: Any):
        """As a hand-written file may hold."""
        with pytest.raises(UnknownNameError, match="expected the name of a scorer, got "):
            registry().stage("scorer", name)
        with pytest.raises(UnknownNameError, match="expected the name of a slot, got "):
            registry().stage(name, "mean-key")
        with pytest.raises(UnknownNameError, match="expected the name of a policy, got "):
            registry().policy_spec(name)

    def test_unknown_names_are_lookup_errors_without_quotes(self):
        """str of a KeyError would show the message in quotes."""
        with pytest.raises(LookupError, match=r"^no policy named 'x'"):
            registry().policy_spec("x")


class TestMake:
    """From a name and options to the object."""

    def test_make_stage(self):
        """With the options given, the rest as it is by default."""
        made = registry().make_stage("units", "pages", page_size=8)

        assert PageUnits(page_size=8) == made

    def test_make_policy(self):
        """Options reach the stages."""
        made = registry(("mine", [PAGED])).make_policy("paged", token_budget=64)

        assert build_paged(PagedConfig(token_budget=64)) == made

    def test_policies_are_listed_by_name(self):
        """With their spec's words."""
        other = attrs.evolve(PAGED, name="another")
        records = registry(("mine", [PAGED, other])).policies()
        record = records[-1]

        assert sorted(r.name for r in records) == [r.name for r in records]
        assert ("paged", PagedConfig, "Pages by their mean key.", "arXiv 0000.00000", "mine") == (
            record.name,
            record.config_cls,
            record.summary,
            record.paper,
            record.plugin.name,
        )

    def test_unknown_option(self):
        """What was meant, and what there is."""
        with pytest.raises(ConfigError) as raised:
            registry(("mine", [PAGED])).make_policy("paged", token_bugdet=64)

        assert str(raised.value) == (
            "PagedConfig has no option 'token_bugdet'; did you mean 'token_budget'? (options: token_budget, page_size)"
        )

    def test_missing_option(self):
        """DecoupledUnits cannot guess its two builders."""
        with pytest.raises(ConfigError, match=r"DecoupledUnits needs prompt, output \(options: prompt, output\)"):
            registry().make_stage("units", "decoupled")

    def test_refused_value(self):
        """A validator's sentence, as a ConfigError with the class's name."""
        paged = registry(("mine", [PAGED]))

        with pytest.raises(ConfigError, match=r"^PagedConfig\(token_budget=0\): 'token_budget' must be >= 1: 0$"):
            paged.make_policy("paged", token_budget=0)
        with pytest.raises(
            ConfigError, match=r"^PagedConfig\(page_size='x'\): 'page_size' must be <class 'int'> \(got 'x'"
        ):
            paged.make_policy("paged", page_size="x")

    def test_complaint_of_kvframe_itself_stays_as_it_is(self):
        """It says already which class and field are meant."""

        def refuse(instance: Any, attribute: Any, value: Any) -> None:
            raise ConfigError("Sample.depth must be even, got 3")

        sample = stage("sample", depth=attrs.field(default=2, validator=refuse))

        with pytest.raises(ConfigError, match=r"^Sample\.depth must be even, got 3$"):
            registry(("mine", [StageSpec(sample)])).make_stage("scorer", "sample", depth=3)

    def test_build_returns_no_policy(self):
        """Named with the plugin."""
        broken = attrs.evolve(PAGED, build=lambda config: None)

        with pytest.raises(
            PluginError, match="'mine' from the caller: build of policy 'paged' returned None, expected a Policy"
        ):
            registry(("mine", [broken])).make_policy("paged")


class TestClashes:
    """A name that two specs claim."""

    def test_stage_name_twice(self):
        """Neither is renamed, neither wins."""
        digest, other = stage("digest"), stage("digest")

        with pytest.raises(NameConflictError) as raised:
            registry(("a", [StageSpec(digest)]), ("b", [StageSpec(other)]))

        assert str(raised.value) == (
            f"scorer 'digest' is registered twice: {digest.__module__}.Sample (plugin 'a' from the caller) and "
            f"{other.__module__}.Sample (plugin 'b' from the caller); "
            "rename one, or block its plugin with KVFRAME_DISABLE_PLUGINS"
        )

    def test_name_of_a_stage_of_kvframe(self):
        """A guest cannot replace what policies on disk refer to."""
        with pytest.raises(
            NameConflictError, match=r"unit builder 'pages' is registered twice: kvframe\.stages\.units\.PageUnits"
        ):
            registry(("mine", [StageSpec(stage("pages", PageUnits))]))

    def test_policy_name_twice(self):
        """Also within one plugin."""
        with pytest.raises(
            NameConflictError, match=r"policy 'paged' is registered twice: .*PagedConfig .* and .*PagedConfig"
        ):
            registry(("mine", [PAGED, PAGED]))


class TestBadStages:
    """Stages that could not run are refused when the registry is made."""

    def refused(self, offered: Any) -> str:
        """What is said of a spec of this stage."""
        with pytest.raises(PluginError) as raised:
            registry(("mine", [StageSpec(offered)]))
        assert str(raised.value).startswith("plugin 'mine' from the caller: ")
        return str(raised.value)

    @pytest.mark.parametrize("offered", [MeanKey(), "mean-key", int, None])
    def test_no_stage_class(self, offered: object):
        """An instance is none: options would have nowhere to go."""
        assert "expected a class derived from one of Trigger, UnitBuilder, Scorer, Selector, Transfer" in self.refused(
            offered
        )

    def test_slot_that_does_not_exist(self):
        """There are five."""
        text = self.refused(stage("x", slot="scorers"))

        assert "has slot 'scorers'; did you mean 'scorer'? (known: trigger, units, scorer, selector, transfer)" in text

    def test_no_slot(self):
        """Derived from Stage itself."""
        assert "has slot None" in self.refused(stage("x", Stage))

    def test_slot_of_another_class(self):
        """The runtime would call methods that it does not have."""
        assert "has slot 'trigger', but is no Trigger" in self.refused(stage("x", slot="trigger"))

    def test_abstract(self):
        """Says what is missing."""
        assert inspect.isabstract(Scorer)
        assert "is abstract; it still has to define index, score" in self.refused(stage("x", Scorer))

    def test_not_attrs(self):
        """Its fields would be those of its base."""
        plain = type("Plain", (MeanKey,), {"name": "plain"})

        assert "Plain is not an attrs class; write @attrs.frozen(kw_only=True) above it" in self.refused(plain)

    @pytest.mark.parametrize("name", ["Mean Key", "mean_key", "", "-x", None, 3])
    def test_name_is_not_kebab_case(self, name: object):
        """It is typed on command lines and written to disk."""
        assert f"has the name {name!r}, expected kebab-case text" in self.refused(stage(name))


class TestBadPolicies:
    """As for stages."""

    @pytest.mark.parametrize(
        "change, expected",
        [
            ({"name": "Paged"}, "a PolicySpec has the name 'Paged', expected lower-case words joined by '-' or '_'"),
            ({"name": None}, "a PolicySpec has the name None"),
            ({"config_cls": int}, "policy 'paged' has config_cls=<class 'int'>, expected an attrs class"),
            ({"config_cls": PagedConfig()}, "expected an attrs class"),
            ({"build": None}, "policy 'paged' has build=None, expected a function from PagedConfig to Policy"),
        ],
    )
    def test_refused(self, change: dict[str, Any], expected: str):
        """With the plugin's name."""
        with pytest.raises(PluginError) as raised:
            registry(("mine", [attrs.evolve(PAGED, **change)]))

        assert str(raised.value).startswith("plugin 'mine' from the caller: ") and expected in str(raised.value)


def test_default_registry_is_made_once():
    """It is what `kvframe.policy` uses."""
    default_registry.cache_clear()

    assert default_registry() is default_registry()


def test_every_error_is_kvframes():
    """A command line can catch them all."""
    with pytest.raises(KvframeError):
        registry().stage("scorer", "x")
