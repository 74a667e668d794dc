"""Layers, origins, the choice of a deployment, paths."""

from pathlib import Path

import pytest

from service.config import reading
from service.config.flags import Flags
from service.config.schema import DeploymentConfig
from service.config.schema import ServerConfig
from service.errors import ConfigError
from tests.config.conftest import Load
from tests.config.conftest import Refusal

ENV = {"HOME": "/home/someone"}


def test_without_a_file_the_embedded_default_runs_on_the_cpu(load: Load) -> None:
    config = load(None)
    assert config.path is None
    assert config.name == "default"
    assert config.deployments == ("default",)
    assert config.deployment == DeploymentConfig()
    assert (config.deployment.model, config.deployment.strategy) == ("smollm2-135m", "cpu")
    assert config.server == ServerConfig()
    assert config.notices == ()
    assert {str(origin) for origin in config.origins.values()} == {"built-in"}


def test_every_key_has_an_origin(load: Load) -> None:
    origins = load(None).origins
    assert set(DeploymentConfig.model_fields) <= set(origins)
    assert {f"server.{key}" for key in ServerConfig.model_fields} <= set(origins)


@pytest.mark.parametrize("name", ["laptop", "rig", "mine"])
def test_the_documented_example_loads(example: Path, name: str) -> None:
    config = reading.load(example, ENV, Flags(deployment=name))
    assert config.name == name
    assert config.deployments == ("laptop", "rig", "mine")
    assert config.deployment.max_context == 8192
    assert [key.key.get_secret_value() for key in config.api_keys] == ["first-key"]
    assert config.notices == ()


def test_values_of_the_example_are_where_the_file_says(example: Path) -> None:
    config = reading.load(example, ENV, Flags(deployment="mine"))
    origins = {key: str(origin) for key, origin in config.origins.items()}
    assert origins["model"] == "moorage.yaml:26"
    assert origins["max_context"] == "moorage.yaml:12"
    assert origins["server.bind"] == "moorage.yaml:6"
    assert origins["quantize"] == "built-in"
    assert origins["deployment"] == "flag --deployment"
    assert config.origins["options.first_layers_on_cpu"].where() == "moorage.yaml:29:15"
    assert config.origins["fallback[1]"].where() == "moorage.yaml:30:28"
    assert config.deployment.options == {"first_layers_on_cpu": 4}
    assert [step.strategy for step in config.deployment.fallback] == ["auto-shard", "cpu"]


def test_a_step_of_fallback_has_values_and_origins_of_its_own(load: Load) -> None:
    config = load(
        "version: 1\n"
        "deployments:\n"
        "  a:\n"
        "    fallback:\n"
        "      - {strategy: auto-shard, quantize: nf4, max_context: 1024}\n"
        "      - cpu\n"
    )
    first, second = config.deployment.fallback
    assert (first.strategy, first.changes) == (
        "auto-shard",
        {"quantize": "nf4", "max_context": 1024},
    )
    assert (second.strategy, second.changes) == ("cpu", {})
    assert config.origins["fallback[0].quantize"].where() == "moorage.yaml:5:32"
    assert config.origins["fallback[1]"].where() == "moorage.yaml:6:9"


@pytest.mark.parametrize("by", ["variable", "flag"])
def test_steps_may_be_written_in_one_line(load: Load, by: str) -> None:
    text = "[{strategy: auto-shard, quantize: nf4}, cpu]"
    env = {"MOORAGE_FALLBACK": text} if by == "variable" else {}
    config = load(None, env, None, *([f"fallback={text}"] if by == "flag" else []))
    assert [step.changes for step in config.deployment.fallback] == [{"quantize": "nf4"}, {}]
    assert config.origins["fallback"].layer == ("env" if by == "variable" else "flag")


def test_a_later_layer_wins_and_every_origin_is_kept(load: Load) -> None:
    config = load(
        "version: 1\n"
        "defaults: {max_context: 1, max_sequences: 1, dtype: float32, quantize: fp4, strategy: a}\n"
        "deployments:\n"
        "  a: {max_sequences: 2, dtype: float16, quantize: fp4, strategy: b}\n",
        {
            "QUANTIZE": "8bit",
            "DEVICE_MAP": "auto",
            "MOORAGE_STRATEGY": "c",
            "MOORAGE_DTYPE": "auto",
        },
        None,
        "dtype=bfloat16",
    )
    values = config.deployment
    origins = {key: str(origin) for key, origin in config.origins.items()}
    assert (values.load_timeout_s, origins["load_timeout_s"]) == (1800.0, "built-in")
    assert (values.max_context, origins["max_context"]) == (1, "moorage.yaml:2")
    assert (values.max_sequences, origins["max_sequences"]) == (2, "moorage.yaml:4")
    assert (values.quantize, origins["quantize"]) == ("int8", "env QUANTIZE")
    assert (values.strategy, origins["strategy"]) == ("c", "env MOORAGE_STRATEGY")
    assert (values.dtype, origins["dtype"]) == ("bfloat16", "flag --set")


def test_only_the_chosen_deployment_is_used(load: Load) -> None:
    text = "version: 1\ndeployment: a\ndeployments: {a: {max_context: 1}, b: {max_context: 2}}\n"
    assert load(text).deployment.max_context == 1
    assert load(text, {"MOORAGE_DEPLOYMENT": "b"}).deployment.max_context == 2
    assert load(text, {"MOORAGE_DEPLOYMENT": "b"}, "a").deployment.max_context == 1
    assert str(load(text, {"MOORAGE_DEPLOYMENT": "b"}).origins["deployment"]) == (
        "env MOORAGE_DEPLOYMENT"
    )


def test_the_only_deployment_needs_no_choice(load: Load) -> None:
    config = load("version: 1\ndeployments:\n  one:\n")
    assert config.name == "one"
    assert str(config.origins["deployment"]) == "moorage.yaml:3"


def test_an_unknown_deployment_is_refused_from_every_layer(refusal: Refusal) -> None:
    text = "version: 1\ndeployment: a\ndeployments: {rig: , a: }\n"
    by_flag = refusal(text, None, "riga")
    assert str(by_flag) == (
        "flag --deployment: there is no deployment 'riga' in moorage.yaml; "
        "did you mean 'rig'? Valid: rig, a"
    )
    assert str(refusal(text, {"MOORAGE_DEPLOYMENT": "b"})) == (
        "env MOORAGE_DEPLOYMENT: there is no deployment 'b' in moorage.yaml; valid: rig, a"
    )
    assert "without a config file" in str(refusal(None, None, "rig"))


def test_empty_blocks_are_empty(load: Load) -> None:
    config = load("version: 1\nserver:\ndefaults:\n  # nothing\ndeployments:\n  a:\n")
    assert config.deployment == DeploymentConfig()


def test_a_mapping_is_replaced_as_a_whole_by_a_later_layer(load: Load) -> None:
    text = (
        "version: 1\ndefaults: {keep_free: {cuda: 1GiB, cpu: 1GiB}}\n"
        "deployments: {a: {keep_free: {cuda: 2GiB}}}\n"
    )
    config = load(text)
    assert config.deployment.keep_free == {"cuda": 2 * 2**30}
    assert str(config.origins["keep_free.cuda"]) == "moorage.yaml:3"
    assert "keep_free.cpu" not in config.origins
    assert load(text, {"MOORAGE_KEEP_FREE": "{cpu: 5}"}).deployment.keep_free == {"cpu": 5}


def test_a_dotted_key_sets_one_entry(load: Load) -> None:
    config = load(
        "version: 1\n"
        "deployments: {a: {strategy: s, options: {x: 1, y: 2}, max_memory: {cpu: 5} }}\n",
        None,
        None,
        "options.y=[3]",
        "options.z=text",
        "max_memory.cuda:0=1GiB",
    )
    assert config.deployment.options == {"x": 1, "y": [3], "z": "text"}
    assert config.deployment.max_memory == {"cpu": 5, "cuda:0": 2**30}
    assert str(config.origins["options.x"]) == "moorage.yaml:2"
    assert str(config.origins["options.y"]) == "flag --set"


def test_of_two_flags_for_one_key_the_later_wins(load: Load) -> None:
    assert load(None, None, None, "max_context=1", "max_context=2").deployment.max_context == 2


def test_relative_paths_of_a_file_are_meant_from_its_folder(folder: Path) -> None:
    home = folder / "etc"
    (home / "models" / "tiny").mkdir(parents=True)
    (home / "keys").write_text("k\n")
    (home / "keys").chmod(0o600)
    file = home / "other.yaml"
    file.write_text(
        "version: 1\n"
        "server: {bind: 'unix:run/m.sock', api_keys_file: keys}\n"
        "deployments:\n"
        "  a: {model: models/tiny, strategy_dirs: [s, /abs], offload_folder: ../off}\n"
        "  b: {model: ./not-there}\n"
        "  c: {model: owner/name}\n"
        "  d: {model: 'models/tiny:x.gguf'}\n"
    )

    def model(name: str) -> str:
        return reading.load(Path("etc/other.yaml"), ENV, Flags(deployment=name)).deployment.model

    config = reading.load(Path("etc/other.yaml"), ENV, Flags(deployment="a"))
    assert config.path == file
    assert config.server.bind == f"unix:{home}/run/m.sock"
    assert config.server.api_keys_file == home / "keys"
    assert config.deployment.strategy_dirs == (home / "s", Path("/abs"))
    assert config.deployment.offload_folder == home / ".." / "off"
    assert str(config.origins["model"]) == "etc/other.yaml:4"
    assert model("a") == str(home / "models" / "tiny")
    assert model("b") == str(home / "not-there")
    assert model("c") == "owner/name"
    assert model("d") == str(home / "models" / "tiny:x.gguf")


def test_relative_paths_of_variables_and_flags_are_meant_from_where_we_are(
    load: Load, folder: Path
) -> None:
    (folder / "sub").mkdir()
    config = load(None, {"MOORAGE_MODEL": "sub", "MOORAGE_CACHE": "c"}, None, "offload_folder=off")
    assert config.deployment.model == str(folder / "sub")
    assert config.deployment.offload_folder == folder / "off"
    assert config.cache == folder / "c"


def test_a_home_folder_is_written_out_or_refused(
    load: Load, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load("version: 1\ndeployments: {a: {model: ~/m}}\n")
    assert config.deployment.model == "/home/someone/m"
    error = refusal("version: 1\ndeployments: {a: {model: ~no-such-user/m}}\n")
    assert str(error).startswith("moorage.yaml:2:19: model is in a home folder that does not exist")


def test_a_file_given_by_its_absolute_path_is_named_from_where_we_are(folder: Path) -> None:
    (folder / "m.yaml").write_text("version: 1\ndeployments: {a: }\n")
    config = reading.load(folder / "m.yaml", ENV, Flags())
    assert str(config.origins["deployment"]) == "m.yaml:2"


def test_the_file_is_the_flag_s_then_the_variable_s_then_the_one_here(folder: Path) -> None:
    env = {"MOORAGE_CONFIG": "env.yaml"}
    assert reading.find(env, Flags(config=Path("flag.yaml"))) == Path("flag.yaml")
    assert reading.find(env, Flags()) == Path("env.yaml")
    assert reading.find({"MOORAGE_CONFIG": ""}, Flags()) is None
    (folder / "moorage.yaml").write_text("")
    assert reading.find({}, Flags()) == Path("moorage.yaml")


def test_a_named_file_that_is_missing_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.yaml: no such file; `moorage config init`"):
        reading.load(Path("gone.yaml"), ENV, Flags())


def test_the_process_is_read_in_one_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "x.yaml").write_text("version: 1\ndeployments: {a: {max_context: 7}}\n")
    monkeypatch.setenv("MOORAGE_CONFIG", "x.yaml")
    monkeypatch.setenv("MOORAGE_MAX_SEQUENCES", "3")
    config = reading.load_process(Flags())
    assert (config.deployment.max_context, config.deployment.max_sequences) == (7, 3)


@pytest.mark.parametrize("bind", ["0.0.0.0:80", "[::]:80", "example.org:80"])
def test_an_open_server_without_keys_gets_a_notice(load: Load, bind: str) -> None:
    (notice,) = load(None, {"MOORAGE_BIND": bind}).notices
    assert notice.startswith(f"server.bind is {bind} (env MOORAGE_BIND) and there is no API key")
    assert load(None, {"MOORAGE_BIND": bind, "MOORAGE_API_KEYS": "k"}).notices == ()


@pytest.mark.parametrize("bind", ["127.0.0.1:1", "localhost:0", "[::1]:80", "unix:/run/m.sock"])
def test_a_server_for_this_machine_only_needs_no_key(load: Load, bind: str) -> None:
    config = load(None, {"MOORAGE_BIND": bind})
    assert config.server.bind == bind
    assert config.notices == ()


def test_options_of_another_strategy_are_dropped_with_a_notice(load: Load) -> None:
    text = "version: 1\ndeployments: {a: {strategy: mine, options: {x: 1}}}\n"
    for env, settings, chooser in [
        ({"DEVICE_MAP": "auto"}, (), "env DEVICE_MAP"),
        ({"MOORAGE_STRATEGY": "auto-shard"}, (), "env MOORAGE_STRATEGY"),
        ({}, ("strategy=auto-shard",), "flag --set"),
    ]:
        config = load(text, env, None, *settings)
        assert config.deployment.options == {}
        assert str(config.origins["options"]) == "built-in"
        assert (
            "options from moorage.yaml:2 were for the strategy mine and are dropped: "
            f"{chooser} chooses auto-shard."
        ) in config.notices


def test_options_stay_when_the_strategy_does(load: Load) -> None:
    text = "version: 1\ndeployments: {a: {strategy: auto-shard, options: {x: 1}}}\n"
    config = load(text, {"DEVICE_MAP": "auto"})
    assert config.deployment.options == {"x": 1}
    assert not [notice for notice in config.notices if "dropped" in notice]


def test_new_options_may_come_with_a_new_strategy(load: Load) -> None:
    text = "version: 1\ndeployments: {a: {strategy: mine, options: {x: 1}}}\n"
    config = load(text, None, None, "strategy=other", "options={y: 2}")
    assert config.deployment.options == {"y": 2}
    config = load(text, None, None, "options.y=2", "strategy=other")
    assert config.deployment.options == {"y": 2}


def test_options_in_defaults_follow_the_deployment_unless_they_name_a_strategy(load: Load) -> None:
    loose = "version: 1\ndefaults: {options: {x: 1}}\ndeployments: {a: {strategy: b}}\n"
    assert load(loose).deployment.options == {"x": 1}
    bound = (
        "version: 1\ndefaults: {strategy: c, options: {x: 1}}\ndeployments: {a: {strategy: b}}\n"
    )
    assert load(bound).deployment.options == {}


def test_a_socket_path_that_is_too_long_once_absolute_is_refused_at_its_line(
    refusal: Refusal, folder: Path
) -> None:
    assert len(str(folder)) > 10
    error = refusal(f"version: 1\nserver: {{bind: 'unix:{'x' * 100}'}}\ndeployments: {{a: }}\n")
    assert str(error).startswith("moorage.yaml:2:10: server.bind has a socket path longer than 107")


def test_a_model_name_too_long_for_a_path_is_left_to_whoever_looks_for_it(load: Load) -> None:
    assert load(None, {"MOORAGE_MODEL": "x" * 5000}).deployment.model == "x" * 5000


def test_a_home_folder_nobody_has_is_refused_for_the_cache_and_the_file(refusal: Refusal) -> None:
    error = refusal(None, {"MOORAGE_CACHE": "~no-such-user/c"})
    assert str(error).startswith("env MOORAGE_CACHE: the cache needs a home folder")
    with pytest.raises(ConfigError, match="there is no such home folder"):
        reading.load(Path("~no-such-user/m.yaml"), ENV, Flags())
