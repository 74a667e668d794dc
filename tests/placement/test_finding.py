"""What pluggy would accept, and fail on at the call, is refused with the author's own words."""

import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import pytest

from service.errors import PluginError
from service.placement import finding
from service.placement import registry
from service.placement.hookspecs import hookimpl
from tests.support.planned import STRATEGY
from tests.support.planned import write_strategy

ROOT = Path(__file__).resolve().parents[2]
BUILT_IN = ["auto-shard", "cpu", "four-bit", "single-gpu"]


def refusal(folder: Path, more: str = "", text: str = STRATEGY) -> PluginError:
    """Why the strategy `mine`, written with these lines, is broken; all others are not."""
    found = registry.build([write_strategy(folder / "mine.py", more, text)])
    assert list(found.broken) == ["mine"], found.broken
    assert sorted(found.strategies) == BUILT_IN
    return found.broken["mine"]


def without(hook: str) -> str:
    head, *functions = STRATEGY.split("@hookimpl\n")
    return head + "".join(f"@hookimpl\n{f}" for f in functions if not f.startswith(f"def {hook}("))


# --- three sources


def test_the_built_in_strategies_are_the_files_of_the_plugins_folder():
    found = {f.name: f.source for f in finding.find([])}
    assert {name: found[name] for name in BUILT_IN} == {
        "auto-shard": "plugins/auto_shard.py",
        "cpu": "plugins/cpu.py",
        "four-bit": "plugins/four_bit.py",
        "single-gpu": "plugins/single_gpu.py",
    }


def test_a_file_in_strategy_dirs_is_found_under_its_name_with_dashes(tmp_path: Path):
    folder = write_strategy(tmp_path / "my_own_one.py")
    write_strategy(tmp_path / "_shared.py")
    (tmp_path / "notes.txt").write_text("not a strategy")
    found = registry.build([folder])
    assert sorted(found.strategies) == sorted([*BUILT_IN, "my-own-one"])
    assert found.strategies["my-own-one"].source == str(tmp_path / "my_own_one.py")
    assert found.strategies["my-own-one"].summary == "A strategy for tests."


def test_a_file_that_was_edited_is_imported_again_and_one_that_was_not_is_not(tmp_path: Path):
    folder = write_strategy(tmp_path / "mine.py", "MARK = 1\n")

    def mark() -> int:
        (found,) = [one for one in finding.find([folder]) if one.name == "mine"]
        mark: int = found.fetch().MARK  # type: ignore[attr-defined]
        return mark

    assert mark() == 1
    twice = [found.fetch() for _ in "12" for found in finding.find([folder])]
    assert len({id(module) for module in twice if hasattr(module, "MARK")}) == 1
    write_strategy(tmp_path / "mine.py", "MARK = 2\n")
    assert mark() == 2


def test_a_module_may_name_itself(tmp_path: Path):
    found = registry.build([write_strategy(tmp_path / "v2.py", 'NAME = "half-and-half"\n')])
    assert "half-and-half" in found.strategies
    assert "v2" not in found.strategies


def test_two_files_of_one_name_in_different_folders_are_different_modules(tmp_path: Path):
    one = write_strategy(tmp_path / "a" / "mine.py", 'NAME = "one"\n')
    two = write_strategy(tmp_path / "b" / "mine.py", 'NAME = "two"\n')
    assert {"one", "two"} <= set(registry.build([one, two]).strategies)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(PluginError, match=r"strategy_dirs: .*/nowhere is not a folder"):
        registry.build([tmp_path / "nowhere"])


def test_another_plugins_package_in_the_working_directory_is_detected(tmp_path: Path):
    """`import plugins` would find the user's own; the built-in strategies would just be gone."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "__init__.py").write_text("")
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from service.errors import PluginError\n"
            "from service.placement import registry\n"
            "try:\n"
            "    registry.build()\n"
            "except PluginError as error:\n"
            "    print(error.one_line())\n",
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        },
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "another package named 'plugins' hides Moorage's own" in said
    assert str(tmp_path / "plugins" / "__init__.py") in said
    assert "start Moorage from another folder" in said


def test_finding_and_checking_strategies_imports_no_torch(tmp_path: Path):
    folder = write_strategy(tmp_path / "mine.py")
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys\n"
            "from pathlib import Path\n"
            "from service.placement import registry\n"
            f"found = registry.build([Path({str(folder)!r})])\n"
            "print(sorted(found.strategies))\n"
            "heavy = ('torch', 'transformers', 'accelerate', 'bitsandbytes')\n"
            "print([name for name in heavy if name in sys.modules])\n",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.splitlines() == [str(sorted([*BUILT_IN, "mine"])), "[]"]


# --- imports that fail


def test_an_import_error_has_the_authors_file_and_line(tmp_path: Path):
    error = refusal(tmp_path, text='"""Mine."""\n\nimport tritonx\n')
    assert error.message == (
        "strategy mine failed to import: No module named 'tritonx' (mine.py:3)"
    )
    assert error.hint == f"see {tmp_path / 'mine.py'}"


def test_an_error_below_the_strategy_has_the_line_that_the_author_wrote(tmp_path: Path):
    text = "import json\n\nsettings = json.loads('{')\n"
    assert refusal(tmp_path, text=text).message.endswith("(mine.py:3)")
    assert "JSONDecodeError: Expecting property name" in refusal(tmp_path, text=text).message


def test_a_syntax_error_has_its_line(tmp_path: Path):
    error = refusal(tmp_path, text='"""Mine."""\n\ndef load(config:\n')
    assert error.message == "strategy mine failed to import: '(' was never closed (mine.py:3)"


# --- what is not a strategy


def test_a_class_is_refused(tmp_path: Path):
    """pluggy registers it and fails at the call, with a missing `self`."""

    class Mine:
        @hookimpl
        def load(self, config, placement): ...

    with pytest.raises(PluginError, match="strategy mine: here is a class") as caught:
        finding.check("mine", Mine, "here")
    assert caught.value.hint == "register an instance of it, or a module of functions"


def test_a_class_inside_a_module_is_pointed_at(tmp_path: Path):
    text = (
        "from service.placement.hookspecs import hookimpl\n\n\n"
        "class Mine:\n    @hookimpl\n    def load(self, config, placement): ...\n"
    )
    error = refusal(tmp_path, text=text)
    assert error.message.startswith("strategy mine lacks load, validate, place_inputs (")
    assert error.hint == "class Mine has hooks: write plain functions"


@pytest.mark.parametrize("hook", ["load", "validate", "place_inputs"])
def test_a_missing_hook_is_named(tmp_path: Path, hook: str):
    """pluggy answers a call without implementations with None."""
    error = refusal(tmp_path, text=without(hook))
    assert error.message == f"strategy mine lacks {hook} ({tmp_path / 'mine.py'})"


def test_several_missing_hooks_are_named_together(tmp_path: Path):
    error = refusal(tmp_path, text='"""Empty."""\n')
    assert "lacks load, validate, place_inputs" in error.message


def test_a_misspelt_hook_is_recognised(tmp_path: Path):
    error = refusal(tmp_path, "\n\n@hookimpl\ndef relase(model): ...\n")
    assert "there is no hook 'relase'; did you mean 'release'?" in error.message
    assert str(tmp_path / "mine.py") in error.message


def test_a_hook_like_no_other_lists_the_hooks(tmp_path: Path):
    error = refusal(tmp_path, "\n\n@hookimpl\ndef quux(): ...\n")
    assert "there is no hook 'quux'; hooks are plan, load, validate" in error.message


def test_a_hook_without_its_mark_is_refused(tmp_path: Path):
    """It would simply not be called."""
    error = refusal(tmp_path, "\n\ndef plan(config, hardware): ...\n")
    assert error.message == f"strategy mine: plan is not marked as a hook ({tmp_path / 'mine.py'})"
    assert error.hint == "write @hookimpl above def plan"


def test_a_misspelt_argument_shows_the_authors_signature(tmp_path: Path):
    error = refusal(tmp_path, "\n\n@hookimpl\ndef plan(config, hardwear): ...\n")
    assert "plan(config, hardwear) asks for 'hardwear'" in error.message
    assert "the hook offers config, hardware; did you mean 'hardware'?" in error.message


@pytest.mark.parametrize("signature", ["config, hardware=None", "config, *, hardware"])
def test_an_argument_that_pluggy_would_leave_out_is_refused(tmp_path: Path, signature: str):
    """It passes plain arguments only: a default would always win, silently."""
    error = refusal(tmp_path, f"\n\n@hookimpl\ndef plan({signature}): ...\n")
    assert f"plan({signature}) would never be given 'hardware'" in error.message
    assert error.hint == "write it as a plain argument, without a default: hardware"


def test_a_hook_may_ask_for_fewer_arguments(tmp_path: Path):
    folder = write_strategy(tmp_path / "mine.py", "\n\n@hookimpl\ndef release(): ...\n")
    assert "mine" in registry.build([folder]).strategies


# --- Options and DEFAULTS


def test_options_must_be_a_pydantic_model(tmp_path: Path):
    assert "Options must be a pydantic model" in refusal(tmp_path, "Options = {}\n").message


def test_defaults_must_be_keys_of_a_deployment(tmp_path: Path):
    error = refusal(tmp_path, 'DEFAULTS = {"quantise": "nf4"}\n')
    assert "DEFAULTS must map keys of a deployment to values; 'quantise' cannot" in error.message
    assert "quantize" in (error.hint or "")
    assert "DEFAULTS must map" in refusal(tmp_path / "list", 'DEFAULTS = ["quantize"]\n').message


@pytest.mark.parametrize("key", ["model", "strategy", "trust_remote_code", "fallback"])
def test_what_is_decided_before_the_strategy_is_asked_cannot_be_its_default(
    tmp_path: Path, key: str
):
    error = refusal(tmp_path, f'DEFAULTS = {{"{key}": "x"}}\n')
    assert f"'{key}' cannot be one" in error.message


def test_a_default_must_be_a_value_that_a_config_could_have(tmp_path: Path):
    error = refusal(tmp_path, 'DEFAULTS = {"quantize": "nf5"}\n')
    assert "DEFAULTS['quantize'] is 'nf5': Input should be 'none', 'nf4'" in error.message


# --- objects


class Instance:
    """A strategy that is an object, as an entry point may give one."""

    touched = 0

    @property
    def gpu(self) -> None:
        raise AssertionError("looking at a strategy must not run it")

    @cached_property
    def device(self) -> None:
        raise AssertionError("looking at a strategy must not run it")

    @hookimpl
    def load(self, config, placement): ...

    @hookimpl
    def validate(self, model): ...

    @hookimpl
    def place_inputs(self, inputs): ...


def test_the_properties_of_an_instance_are_left_alone():
    """One may ask for a GPU, in a process that will fork."""
    finding.check("mine", Instance(), "here")
    with pytest.raises(PluginError, match="is a class"):
        finding.check("mine", Instance, "here")
