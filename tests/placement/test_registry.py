"""Strategies are found, the broken ones kept as their errors, and one is selected."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pluggy
import pytest
from pydantic import BaseModel

from service.config.origin import BUILT_IN
from service.config.origin import Origin
from service.config.schema import DeploymentConfig
from service.errors import ConfigError
from service.errors import PlacementUnavailable
from service.errors import PluginError
from service.placement import finding
from service.placement import registry
from service.placement.certificate import certify
from service.placement.finding import Found
from service.placement.hookspecs import hookimpl
from service.placement.registry import Strategy
from tests.placement.test_finding import Instance
from tests.support.planned import GIB
from tests.support.planned import STRATEGY
from tests.support.planned import bring_up
from tests.support.planned import cards
from tests.support.planned import model_config
from tests.support.planned import ram
from tests.support.planned import write_strategy
from tests.support.tiny import save_tiny

OPTIONS = """
from pydantic import BaseModel


class Options(BaseModel):
    first_layers: int = 0
    where: str = "cpu"
"""


def mine(folder: Path, more: str = "", text: str = STRATEGY) -> Strategy:
    """The strategy `mine` with these lines added."""
    return registry.build([write_strategy(folder / "mine.py", more, text)]).select("mine")


# --- select


def test_the_strategies_that_come_along_are_usable():
    found = registry.build()
    assert {"auto-shard", "cpu", "four-bit", "single-gpu"} <= set(found.strategies)
    assert found.select("cpu").summary == "The whole model in RAM, computed by the CPU."
    assert found.select("four-bit").defaults == {"quantize": "nf4"}
    assert found.select("single-gpu").options_schema is not None


def test_an_unknown_name_suggests_and_lists_where_it_was_written():
    origin = Origin("file", "moorage.yaml", 10, 15, "    strategy: auto-shart")
    with pytest.raises(ConfigError) as caught:
        registry.build().select("auto-shart", origin)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        "moorage.yaml:10:15: strategy: unknown strategy 'auto-shart'; did you mean 'auto-shard'? "
        "Installed: auto-shard, cpu"
    )
    assert lines[1].strip() == "strategy: auto-shart"
    assert lines[2].index("^") == 3 + 14


def test_a_broken_neighbour_disturbs_nobody_and_is_raised_when_selected(tmp_path: Path):
    write_strategy(tmp_path / "bad.py", text="import tritonx\n")
    found = registry.build([write_strategy(tmp_path / "good.py")])
    assert found.select("good").name == "good"
    assert found.select("cpu").name == "cpu"
    with pytest.raises(PluginError, match="No module named 'tritonx'"):
        found.select("bad")


def test_a_strategy_that_breaks_when_it_is_looked_at_disturbs_nobody(
    monkeypatch: pytest.MonkeyPatch,
):
    class Hostile(Instance):
        @property
        def NAME(self) -> str:
            raise RuntimeError("no GPU")

    entry(monkeypatch, Found("hostile", "here", Hostile), Found("fine", "there", Instance))
    found = registry.build()
    assert list(found.strategies) == ["fine"]
    assert "strategy hostile cannot be examined: RuntimeError: no GPU" in str(
        found.broken["hostile"]
    )


def entry(monkeypatch: pytest.MonkeyPatch, *found: Found) -> None:
    def find(strategy_dirs: object, files: object) -> Iterator[Found]:
        return iter(found)

    monkeypatch.setattr(finding, "find", find)


def test_a_name_that_occurs_twice_is_nobodys(tmp_path: Path):
    found = registry.build([write_strategy(tmp_path / "cpu.py")])
    assert "cpu" not in found.strategies
    with pytest.raises(PluginError) as caught:
        found.select("cpu")
    assert caught.value.message == (
        f"2 strategies are called cpu: plugins/cpu.py and {tmp_path / 'cpu.py'}"
    )
    assert caught.value.hint == "give one of them another NAME"


@pytest.mark.parametrize("broken", [1, 2, 3])
def test_three_of_a_name_are_all_listed_even_if_one_is_broken(tmp_path: Path, broken: int):
    folders = []
    for number in (1, 2, 3):
        text = "import tritonx\n" if number == broken else STRATEGY
        folders.append(write_strategy(tmp_path / str(number) / "mine.py", text=text))
    found = registry.build(folders)
    assert "mine" not in found.strategies
    sources = " and ".join(str(tmp_path / str(number) / "mine.py") for number in (1, 2, 3))
    assert found.broken["mine"].message == f"3 strategies are called mine: {sources}"


def test_an_instance_is_a_strategy_too(monkeypatch: pytest.MonkeyPatch):
    entry(monkeypatch, Found("object", "somewhere: thing", Instance))
    strategy = registry.build().select("object")
    assert strategy.summary == "A strategy that is an object, as an entry point may give one."


# --- closed


def test_only_the_selected_strategy_is_called(tmp_path: Path):
    """All strategies implement the same hooks; with `firstresult` the last one would answer."""
    tell = "\n\n@hookimpl\ndef release(model):\n    model.append(NAME)\n"
    for name in ("a", "b", "c"):
        write_strategy(tmp_path / f"{name}.py", f'NAME = "{name}"{tell}')
    found = registry.build([tmp_path])
    for name in ("b", "a", "c"):
        called: Any = []
        found.select(name).release(called)
        assert called == [name]


def test_a_strategy_registered_later_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """pluggy's subset callers follow registrations, and with `firstresult` the last one wins."""
    managers: list[pluggy.PluginManager] = []
    bind = pluggy.PluginManager.subset_hook_caller

    def remembered(self: pluggy.PluginManager, *args: Any) -> Any:
        managers.append(self)
        return bind(self, *args)

    # ours only: pytest runs on a manager of the same class
    monkeypatch.setattr(registry._Manager, "subset_hook_caller", remembered)
    strategy = mine(tmp_path)

    class Late(Instance):
        @hookimpl(tryfirst=True)
        def place_inputs(self, inputs):
            return "late"

    with pytest.raises(PluginError, match="came too late"):
        managers[0].register(Late())
    assert strategy.place_inputs(None, {"input_ids": 1}) == {"input_ids": 1}


# --- calls


def test_what_a_strategy_leaves_out_has_a_default(tmp_path: Path):
    """plan: the first GPU, else the CPU. release: nothing."""
    strategy = mine(tmp_path / "plugins")
    config = model_config(save_tiny(tmp_path / "m"), strategy="mine")
    assert strategy.plan(config, ram(GIB)).module_map == {"": "cpu"}
    assert strategy.plan(config, cards(GIB, GIB)).module_map == {"": "cuda:0"}
    strategy.release(object())  # type: ignore[arg-type]


def test_a_plan_without_a_result_is_not_answered_by_the_default(tmp_path: Path):
    """A forgotten `return` would go unnoticed: pluggy asks the next implementation."""
    strategy = mine(tmp_path, "\n\n@hookimpl\ndef plan(config): ...\n")
    with pytest.raises(PluginError, match=r"strategy mine: plan returned None; it must return a"):
        strategy.plan(model_config(tmp_path), ram(GIB))


def test_an_error_of_a_hook_has_the_strategys_name_and_the_authors_line(tmp_path: Path):
    strategy = mine(tmp_path, "\n\n@hookimpl\ndef plan(config):\n    return {}['x']\n")
    line = STRATEGY.count("\n") + 5
    with pytest.raises(PluginError) as caught:
        strategy.plan(model_config(tmp_path), ram(GIB))
    assert caught.value.message == (
        f"strategy mine: plan raised KeyError: 'x' (mine.py:{line}) ({tmp_path / 'mine.py'})"
    )


def test_our_own_errors_pass_through_a_strategy(tmp_path: Path):
    text = (
        "\n\n@hookimpl\ndef plan(config):\n"
        "    from service.errors import PlacementUnavailable\n\n"
        "    raise PlacementUnavailable('needs two cards', hint='buy one')\n"
    )
    with pytest.raises(PlacementUnavailable, match="needs two cards"):
        mine(tmp_path, text).plan(model_config(tmp_path), ram(GIB))


def test_load_must_return_a_model(tmp_path: Path):
    text = STRATEGY.replace("return AutoModel", "AutoModel")
    strategy = mine(tmp_path / "plugins", text=text)
    config = model_config(save_tiny(tmp_path / "m"))
    with pytest.raises(PluginError, match="strategy mine: load returned None; it must return the"):
        bring_up(strategy, config, ram(GIB))


# --- defaults and options


def settled(strategy: Strategy, origins: dict[str, Origin], **words: Any) -> DeploymentConfig:
    return registry.settle(DeploymentConfig(**words), strategy, origins)


def test_a_strategys_defaults_are_below_what_the_operator_says(tmp_path: Path):
    """They win over built-in values only."""
    strategy = mine(tmp_path, 'DEFAULTS = {"quantize": "nf4", "keep_free": {"cuda": "1GiB"}}\n')
    plain = settled(strategy, {"quantize": BUILT_IN})
    assert (plain.quantize, plain.keep_free, plain.strategy) == ("nf4", {"cuda": GIB}, "mine")
    for layer, name in (("file", "moorage.yaml"), ("env", "QUANTIZE"), ("flag", "--quantize")):
        said = settled(strategy, {"quantize": Origin(layer, name)}, quantize="none")
        assert (said.quantize, said.keep_free) == ("none", {"cuda": GIB})


def test_options_are_given_to_the_strategy_as_its_own_model(tmp_path: Path):
    strategy = mine(tmp_path, OPTIONS)
    options = settled(strategy, {}, options={"first_layers": "4"}).options
    assert isinstance(options, BaseModel)
    assert (options.first_layers, options.where) == (4, "cpu")  # type: ignore[attr-defined]
    assert settled(strategy, {}).options.first_layers == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", ["", "    model_config = {'extra': 'forbid'}\n"])
def test_an_unknown_option_suggests_and_has_its_position(tmp_path: Path, config: str):
    """Also where the author's model would silently drop it."""
    strategy = mine(tmp_path, OPTIONS + config)
    origin = Origin("file", "moorage.yaml", 7, 16, "    options: {first_layer: 4}")
    with pytest.raises(ConfigError) as caught:
        settled(strategy, {"options": origin}, options={"first_layer": 4})
    assert str(caught.value).splitlines()[0] == (
        "moorage.yaml:7:16: options.first_layer: strategy mine has no such option; "
        "did you mean 'first_layers'?"
    )


def test_an_option_has_the_position_of_its_own_line(tmp_path: Path):
    strategy = mine(tmp_path, OPTIONS)
    origins = {
        "options": Origin("file", "moorage.yaml", 7, 5),
        "options.first_layers": Origin("flag", "--set"),
    }
    with pytest.raises(ConfigError) as caught:
        settled(strategy, origins, options={"first_layers": "four", "where": 3})
    assert [str(problem) for problem in caught.value.problems] == [
        "flag --set: options.first_layers: input should be a valid integer, "
        "unable to parse string as an integer",
        "moorage.yaml:7:5: options.where: input should be a valid string",
    ]


def test_a_model_that_takes_anything_is_the_authors_choice(tmp_path: Path):
    strategy = mine(tmp_path, OPTIONS + "    model_config = {'extra': 'allow'}\n")
    assert settled(strategy, {}, options={"anything": 1}).options.anything == 1  # type: ignore[attr-defined]


def test_a_strategy_without_options_refuses_them(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"options\.first_layers: strategy mine has no options"):
        settled(mine(tmp_path), {}, options={"first_layers": 4})


def test_options_that_break_are_the_plugins_fault(tmp_path: Path):
    more = (
        "from pydantic import field_validator\n"
        + OPTIONS
        + "    @field_validator('first_layers')\n"
        "    def checked(cls, value):\n        raise OSError('no table')\n"
    )
    with pytest.raises(PluginError, match=r"strategy mine: Options raised OSError: no table"):
        settled(mine(tmp_path, more), {}, options={"first_layers": 4})


def test_a_fallback_runs_with_its_own_defaults(tmp_path: Path):
    """The options are those of the first strategy."""
    config = DeploymentConfig(options={"first_layers": 4})
    after = registry.settle(config, mine(tmp_path), {}, first=False)
    assert after.options is None


# --- the whole way


def test_a_strategy_with_the_three_hooks_serves(tmp_path: Path):
    strategy = mine(tmp_path / "plugins")
    loaded = bring_up(strategy, model_config(save_tiny(tmp_path / "m")), ram(GIB))
    assert certify(loaded).valid


def test_what_pytest_keeps_beside_strategies_is_none(tmp_path: Path):
    for name in ("mine.py", "test_mine.py", "conftest.py", "_shared.py"):
        (tmp_path / name).write_text(STRATEGY)
    found = registry.build([tmp_path])
    assert {name for name, where in found.sources.items() if str(tmp_path) in where[0]} == {"mine"}


def test_one_file_found_twice_is_one_strategy(tmp_path: Path):
    (tmp_path / "mine.py").write_text(STRATEGY)
    found = registry.build([tmp_path], files=[tmp_path / "mine.py"])
    assert "mine" in found.strategies
    assert len(found.sources["mine"]) == 2
