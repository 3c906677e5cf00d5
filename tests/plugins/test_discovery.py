"""How plugins are found and loaded, and what is said when one is at fault."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pluggy
import pytest

from kvframe.errors import PluginConflictError, PluginError, PluginLoadError, PluginVersionError
from kvframe.hookspecs import hookimpl
from kvframe.plugins import HOOKS, PluginWarning, create_plugin_manager

Install = Callable[..., Path]

GOOD = """
from kvframe.hookspecs import hookimpl

KVFRAME_API_VERSION = 1

@hookimpl
def kvframe_check_policy(policy):
    return []
"""


def plugin(name: str = "mine", **attributes: Any) -> ModuleType:
    """A plugin module made on the spot."""
    module = ModuleType(name)
    vars(module).update({"KVFRAME_API_VERSION": 1, **attributes})
    return module


@hookimpl
def kvframe_check_policy(policy: Any) -> list[str]:
    """An implementation that any plugin of this file can have."""
    return []


class TestOrder:
    """What is loaded, when."""

    def test_core_comes_first_then_installed_by_name_then_passed(self, install: Install):
        """Metadata order is that of sys.path and the file system; ours is not."""
        install("kv_a", "ant", GOOD)
        install("kv_b", "zebra", GOOD)
        passed = plugin("given", kvframe_check_policy=kvframe_check_policy)

        plugins = create_plugin_manager([passed])

        assert [record.name for record in plugins.records] == ["core", "ant", "zebra", "given"]

    def test_autoload_off_leaves_installed_plugins_alone(self, install: Install):
        """Not even their modules are imported."""
        install("kv_bad", "bad", "import no_such_module")

        plugins = create_plugin_manager(autoload=False)

        assert [record.name for record in plugins.records] == ["core"]

    def test_every_build_is_fresh(self):
        """Nothing is remembered of an earlier one."""
        first = create_plugin_manager([plugin(kvframe_check_policy=kvframe_check_policy)], autoload=False)
        second = create_plugin_manager(autoload=False)

        assert [record.name for record in first.records] == ["core", "mine"]
        assert [record.name for record in second.records] == ["core"]

    def test_failed_build_leaves_nothing_behind(self):
        """The build after it is as if it had not been."""
        good = plugin("good", kvframe_check_policy=kvframe_check_policy)
        with pytest.raises(PluginError):
            create_plugin_manager([good, plugin("bad", KVFRAME_API_VERSION=0)], autoload=False)

        plugins = create_plugin_manager([good], autoload=False)

        assert [record.name for record in plugins.records] == ["core", "good"]

    def test_passed_plugin_that_is_installed_too_is_loaded_once(self, install: Install):
        """Under the name of its entry point."""
        install("kv_quest", "quest", GOOD)
        module = __import__("kv_quest")

        plugins = create_plugin_manager([module])

        assert [record.name for record in plugins.records] == ["core", "quest"]

    def test_instance_is_a_plugin_too(self):
        """Its class gives the name."""

        class Mine:
            KVFRAME_API_VERSION = 1

            @hookimpl
            def kvframe_check_policy(self, policy: Any) -> list[str]:
                return ["too slow"]

        plugins = create_plugin_manager([Mine()], autoload=False)

        assert plugins.records[-1].name == "Mine"
        assert plugins.check_policy(None, None) == ["too slow (says plugin 'Mine' from the caller)"]

    def test_egg_info_beside_dist_info_is_no_second_plugin(self, install: Install):
        """As in a checkout that is also installed."""
        install("kv_quest", "quest", GOOD)
        install("kv_quest", "quest", GOOD, metadata="egg-info")

        plugins = create_plugin_manager()

        assert [record.name for record in plugins.records] == ["core", "quest"]

    def test_finding_plugins_needs_neither_torch_nor_transformers_nor_triton(self):
        """The hooks' module is what a plugin imports first."""
        code = (
            "import sys, types\n"
            "package = sys.modules['kvframe'] = types.ModuleType('kvframe')\n"
            "package.__path__ = [sys.argv[1]]\n"
            "import kvframe.hookspecs, kvframe.plugins, kvframe.options\n"
            "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
        )
        folder = str(Path(sys.modules["kvframe.hookspecs"].__file__ or "").parent)

        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)

        assert done.stdout.strip() == "[]"


class TestDescribe:
    """What is kept of each plugin."""

    def test_record_knows_where_a_plugin_comes_from(self, install: Install):
        """Name, distribution, version, module and hooks, without pluggy's private lists."""
        install("kv_quest", "quest", GOOD, module="kv_quest_plugin")

        described = create_plugin_manager().describe()[-1]

        assert described == {
            "name": "quest",
            "module": "kv_quest_plugin",
            "distribution": "kv_quest",
            "version": "1.0",
            "hooks": ("kvframe_check_policy",),
            "enabled": True,
        }

    def test_description_is_json(self, install: Install):
        """It goes into bug reports."""
        install("kv_quest", "quest", GOOD)

        assert "kv_quest" in json.dumps(create_plugin_manager().describe())


class TestDisable:
    """KVFRAME_DISABLE_PLUGINS."""

    def test_named_plugin_is_not_imported(self, install: Install, monkeypatch: pytest.MonkeyPatch):
        """It is still described, as disabled."""
        install("kv_bad", "bad", "import no_such_module")
        install("kv_quest", "quest", GOOD)
        monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "bad, ")

        plugins = create_plugin_manager()

        assert [record.name for record in plugins.records] == ["core", "quest"]
        assert [record.name for record in plugins.disabled] == ["bad"]
        assert [entry["enabled"] for entry in plugins.describe()] == [True, True, False]

    def test_conflict_can_be_blocked(self, install: Install, monkeypatch: pytest.MonkeyPatch):
        """The way out that the conflict's message names is one."""
        install("kv_quest", "quest", GOOD)
        install("other_quest", "quest", GOOD)
        monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "quest")

        plugins = create_plugin_manager()

        assert [record.name for record in plugins.records] == ["core"]
        assert [record.name for record in plugins.disabled] == ["quest", "quest"]

    def test_name_of_no_plugin_warns(self, install: Install, monkeypatch: pytest.MonkeyPatch):
        """A misspelt name would otherwise block nothing, silently."""
        install("kv_quest", "quest", GOOD)
        monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "qeust")

        with pytest.warns(
            PluginWarning, match="names 'qeust', but there is no such plugin; did you mean 'quest'?"
        ) as caught:
            create_plugin_manager()

        assert __file__ == caught[0].filename

    def test_names_of_installed_plugins_do_not_matter_without_autoload(self, monkeypatch: pytest.MonkeyPatch):
        """There, nothing is known of them."""
        monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "quest")

        plugins = create_plugin_manager(autoload=False)

        assert () == plugins.disabled

    def test_core_cannot_be_disabled(self, monkeypatch: pytest.MonkeyPatch):
        """Every other plugin builds on it."""
        monkeypatch.setenv("KVFRAME_DISABLE_PLUGINS", "core")

        with pytest.raises(PluginError, match="names 'core', kvframe's own stages, which are always there; remove it"):
            create_plugin_manager(autoload=False)


class TestTrouble:
    """A plugin at fault is named, with its distribution and the way out."""

    def test_two_distributions_one_name(self, install: Install):
        """pluggy's own loader would skip the second."""
        install("kv_quest", "quest", GOOD, module="m1")
        install("other_quest", "quest", GOOD, module="m2")

        with pytest.raises(PluginConflictError) as raised:
            create_plugin_manager()

        assert str(raised.value) == (
            "plugin name 'quest' is claimed by 2 distributions: kv_quest 1.0 (m1), other_quest 1.0 (m2); "
            "uninstall one, or block it with KVFRAME_DISABLE_PLUGINS"
        )

    def test_name_of_core_is_taken(self, install: Install):
        """A stranger cannot replace the built-in stages."""
        install("kv_core", "core", GOOD)

        with pytest.raises(PluginConflictError, match=r"'core' is claimed by 2 distributions: kvframe .*kv_core 1\.0"):
            create_plugin_manager()

    def test_two_passed_plugins_one_name(self):
        """There is nothing to uninstall, but the message still says who clashes."""
        one, other = (plugin("mine", kvframe_check_policy=kvframe_check_policy) for _ in range(2))

        with pytest.raises(
            PluginConflictError, match=r"'mine' is claimed 2 times: the caller \(mine\), the caller \(mine\)"
        ):
            create_plugin_manager([one, other], autoload=False)

    def test_one_module_two_names(self, install: Install):
        """Everything in it would be registered twice."""
        install("kv_quest", "quest", GOOD, module="shared_module")
        install("kv_again", "quest-again", GOOD, module="shared_module")

        with pytest.raises(PluginConflictError) as raised:
            create_plugin_manager()

        assert str(raised.value) == (
            "plugin 'quest-again' from kv_again 1.0 is shared_module, which is plugin 'quest' already; "
            "keep one of the two entry points"
        )

    def test_failed_import(self, install: Install):
        """With the plugin's name, its distribution and the cause."""
        install("kv_bad", "bad", "import no_such_module", module="m3")

        with pytest.raises(PluginLoadError) as raised:
            create_plugin_manager()

        assert str(raised.value).startswith(
            "plugin 'bad' from kv_bad 1.0 (m3) failed to import: "
            "ModuleNotFoundError: No module named 'no_such_module'; "
        )
        assert "KVFRAME_DISABLE_PLUGINS" in str(raised.value)
        assert isinstance(raised.value, ImportError) and isinstance(raised.value.__cause__, ModuleNotFoundError)

    def test_any_failure_of_an_import_is_told_with_the_name(self, install: Install):
        """Modules fail in other ways than by missing imports."""
        install("kv_bad", "bad", "1 / 0")

        with pytest.raises(PluginLoadError, match=r"'bad' from kv_bad 1\.0 .* ZeroDivisionError: division by zero"):
            create_plugin_manager()

    def test_misspelt_hook(self, install: Install):
        """Silent in pluggy until check_pending, which knows no suggestion."""
        install("kv_typo", "typo", GOOD.replace("kvframe_check_policy", "kvframe_policy"))

        with pytest.raises(PluginError) as raised:
            create_plugin_manager()

        assert str(raised.value).startswith(
            "plugin 'typo' from kv_typo 1.0 implements unknown hook 'kvframe_policy'; did you mean 'kvframe_policies'?"
        )
        assert all(hook in str(raised.value) for hook in HOOKS)

    def test_marked_function_without_the_prefix(self):
        """The marker says that a hook is meant."""

        @hookimpl
        def stages() -> list[Any]:
            return []

        with pytest.raises(PluginError, match="unknown hook 'stages'"):
            create_plugin_manager([plugin(stages=stages)], autoload=False)

    def test_hook_of_a_later_kvframe_may_be_optional(self):
        """pluggy's optionalhook lets a plugin serve two versions."""

        @hookimpl(optionalhook=True)
        def kvframe_of_tomorrow() -> None: ...

        mine = plugin(kvframe_of_tomorrow=kvframe_of_tomorrow, kvframe_check_policy=kvframe_check_policy)

        plugins = create_plugin_manager([mine], autoload=False)

        assert plugins.records[-1].hooks == ("kvframe_check_policy",)

    def test_function_of_another_name_implements_the_hook_it_says(self):
        """pluggy's specname."""

        @hookimpl(specname="kvframe_check_policy")
        def check(policy: Any) -> list[str]:
            return ["too slow"]

        plugins = create_plugin_manager([plugin(check=check)], autoload=False)

        assert ("kvframe_check_policy",) == plugins.records[-1].hooks
        assert ["too slow (says plugin 'mine' from the caller)"] == plugins.check_policy(None, None)

    def test_missing_marker(self, install: Install):
        """The name says that a hook is meant."""
        install("kv_plain", "plain", GOOD.replace("@hookimpl", ""))

        with pytest.raises(PluginError) as raised:
            create_plugin_manager()

        assert str(raised.value) == (
            "plugin 'plain' from kv_plain 1.0 has a 'kvframe_check_policy' that is not marked; "
            "write @kvframe.hookimpl above the function"
        )

    def test_imported_hookspec_is_no_missing_marker(self):
        """A plugin may import the specs, to refer to them."""
        from kvframe import hookspecs

        mine = plugin(kvframe_stages=hookspecs.kvframe_stages, kvframe_check_policy=kvframe_check_policy)

        plugins = create_plugin_manager([mine], autoload=False)

        assert plugins.records[-1].hooks == ("kvframe_check_policy",)

    def test_no_hook_at_all_warns(self, install: Install):
        """Whoever installed it expects something of it."""
        install("kv_idle", "idle", "KVFRAME_API_VERSION = 1")

        with pytest.warns(
            PluginWarning, match=r"plugin 'idle' from kv_idle 1\.0 \(kv_idle\) implements no hook; mark"
        ) as caught:
            plugins = create_plugin_manager()

        assert plugins.records[-1].hooks == ()
        assert __file__ == caught[0].filename

    def test_wrong_argument(self, install: Install):
        """pluggy's complaint, with the distribution and the arguments that the hook has."""
        install("kv_args", "args", GOOD.replace("(policy)", "(polcy)"))

        with pytest.raises(PluginError) as raised:
            create_plugin_manager()

        assert "plugin 'args' from kv_args 1.0 does not fit its hooks: " in str(raised.value)
        assert "'polcy'" in str(raised.value)
        assert str(raised.value).endswith("expected kvframe_check_policy(policy, layout)")
        assert isinstance(raised.value.__cause__, pluggy.PluginValidationError)

    def test_missing_api_version(self, install: Install):
        """A plugin that does not say what it was written for could break anywhere."""
        install("kv_mute", "mute", GOOD.replace("KVFRAME_API_VERSION = 1", ""))

        with pytest.raises(PluginVersionError) as raised:
            create_plugin_manager()

        assert str(raised.value) == (
            "plugin 'mute' from kv_mute 1.0 does not say which plugin API it was written for; "
            "write KVFRAME_API_VERSION = 1 into kv_mute"
        )

    @pytest.mark.parametrize("version", ["0", "2", "'1'"])
    def test_other_api_version(self, install: Install, version: str):
        """Before any of its hooks is looked at."""
        install("kv_old", "old", GOOD.replace("VERSION = 1", f"VERSION = {version}").replace("check_policy", "gone"))

        with pytest.raises(PluginVersionError) as raised:
            create_plugin_manager()

        assert str(raised.value).startswith(
            f"plugin 'old' from kv_old 1.0 was written for plugin API {version}, this kvframe provides 1; "
        )

    def test_class_instead_of_instance(self):
        """pluggy would call its methods without self."""

        class Mine:
            KVFRAME_API_VERSION = 1

        with pytest.raises(
            PluginError, match=r"expected a module or an instance, got the class .*Mine; pass an instance"
        ):
            create_plugin_manager([Mine], autoload=False)

    @pytest.mark.parametrize("hook", ["kvframe_stages", "kvframe_policies", "kvframe_check_policy"])
    def test_wrapper_around_collected_answers(self, hook: str):
        """It would silently wrap nothing."""

        def wrapper():
            return (yield)

        with pytest.raises(PluginError, match=f"wraps '{hook}', which is asked plugin by plugin"):
            create_plugin_manager([plugin(**{hook: hookimpl(wrapper=True)(wrapper)})], autoload=False)

    def test_namespace_is_a_plugin(self):
        """Any object with marked functions is."""
        mine = SimpleNamespace(KVFRAME_API_VERSION=1, kvframe_check_policy=kvframe_check_policy)

        assert create_plugin_manager([mine], autoload=False).records[-1].name == "SimpleNamespace"
