"""What is wrong in a file, in plain words, all of it at once."""

import pytest

from service.errors import ConfigError
from tests.config.conftest import Refusal

HEAD = "version: 1\ndeployments:\n  laptop:\n"


def test_an_unknown_key_names_its_line_and_suggests(refusal: Refusal) -> None:
    error = refusal("version: 1\n\n\n\n\n\n\ndeployments:\n  laptop:\n    strategey: cpu\n")
    assert str(error) == (
        "moorage.yaml:10:5: deployments.laptop.strategey: unknown key; did you mean 'strategy'?\n"
        "       strategey: cpu\n"
        "       ^"
    )
    assert error.exit_status == 3


def test_all_mistakes_of_all_deployments_are_reported_in_the_order_of_the_lines(
    refusal: Refusal,
) -> None:
    error = refusal(
        "version: 1\n"
        "deployment: laptop\n"
        "server: {threads: 3}\n"
        "defaults:\n"
        "  max_sequences: 0\n"
        "deployments:\n"
        "  laptop: {strategey: cpu}\n"
        "  rig:\n"
        "    quantize: nf5\n"
        "    max_context: 8k\n"
        "    max_context: 9k\n",
        {"MOORAGE_STRATEGEY": "x", "QUANTIZE": "5bit"},
        None,
        "max_context=no",
    )
    assert [problem.where for problem in error.problems] == [
        "moorage.yaml:3:10",
        "moorage.yaml:5:3",
        "moorage.yaml:7:12",
        "moorage.yaml:9:5",
        "moorage.yaml:10:5",
        "moorage.yaml:11:5",
        "env QUANTIZE",
        "env MOORAGE_STRATEGEY",
        "flag --set",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_sequences: 0", "max_sequences is 0; give 1 or more"),
        ("max_sequences: 100000", "max_sequences is 100000; give 65,536 or less"),
        ("max_context: 8k", "max_context is '8k'; give a whole number, 1 or more"),
        ("max_context: 1.5", "max_context is 1.5; give a whole number, 1 or more"),
        ("max_context: true", "max_context is true; give a whole number, 1 or more"),
        ("max_context:", "max_context is empty; give a whole number, 1 or more"),
        ("load_timeout_s: 0", "load_timeout_s is 0; give more than 0"),
        ("load_timeout_s: soon", "load_timeout_s is 'soon'; give a number, more than 0"),
        ("trust_remote_code: yes", "trust_remote_code is 'yes'; give true or false"),
        ("trust_remote_code: 1", "trust_remote_code is 1; give true or false"),
        (
            "quantize: nf5",
            "quantize is 'nf5'; did you mean 'nf4'? Valid: none, nf4, fp4, int8, int4",
        ),
        (
            "quantize: 4bit",
            "quantize is '4bit'; did you mean 'nf4'? Valid: none, nf4, fp4, int8, int4",
        ),
        ("quantize: gptq", "quantize is 'gptq'; valid: none, nf4, fp4, int8, int4"),
        ("quantize:", "quantize is empty; did you mean 'none'? Valid: none, nf4, fp4, int8, int4"),
        ("on_no_fit: Refuse", "on_no_fit is 'Refuse'; did you mean 'refuse'? Valid: refuse,"),
        ("model: 12", "model is 12; give text, in quotes: '12'"),
        ("model: ''", "model is empty; give text"),
        ("model: [a]", "model is a list; give text"),
        ("strategy_dirs: ./a", "strategy_dirs is './a'; give a list"),
        ("strategy_dirs: ['']", "strategy_dirs[0] is empty; give a path"),
        (
            "fallback: [cpu, 3]",
            "fallback[1] is 3; give the name of a strategy, or {strategy: NAME, quantize: nf4}",
        ),
        ("fallback: [{quantize: nf4}]", "fallback[0].strategy is missing"),
        ("fallback: ['']", "fallback[0].strategy is empty; give text"),
        (
            "fallback: [{strategy: cpu, quantise: nf4}]",
            "fallback[0].quantise: unknown key; did you mean 'quantize'?",
        ),
        (
            "fallback: [{strategy: cpu, options: {}}]",
            "fallback[0].options: unknown key; 'options' belongs in a deployment or in defaults",
        ),
        (
            "fallback: [{strategy: cpu, quantize: 4bit}]",
            "fallback[0].quantize is '4bit'; did you mean 'nf4'? Valid: none, nf4, fp4, int8, int4",
        ),
        (
            "fallback: [{strategy: cpu, quantize: }]",
            "fallback[0].quantize is empty; give a value or leave it out",
        ),
        (
            "fallback: [{strategy: cpu, max_sequences: 0}]",
            "fallback[0].max_sequences is 0; give 1 or more",
        ),
        ("options: 4", "options is 4; give a mapping"),
        ("offload_folder: 3", "offload_folder is 3; give a path"),
        ("offload_folder: ' '", "offload_folder is empty; give a path"),
        ("keep_free: {cuda: 1Gig}", "keep_free.cuda is '1Gig'; give a size such as 512MiB"),
        ("keep_free: {cuda: -1}", "keep_free.cuda is -1; give 0 or more"),
        ("keep_free: {cdua: 1GiB}", "keep_free.cdua is no device; give cuda, cuda:0, cuda:1"),
        ("max_memory: {'0': 1GiB}", "max_memory.0 is no device; give cuda:0, cuda:1, ..., cpu"),
        ("max_memory: {cuda: 1GiB}", "max_memory.cuda is no device; give cuda:0, cuda:1, ..., cpu"),
        ("max_memory: {'cuda:01': 1}", "max_memory.cuda:01 is no device; give cuda:0, cuda:1"),
        ("device_map: auto", "device_map: unknown key; here it is 'strategy'"),
        ("bind: 0.0.0.0:80", "bind: unknown key; 'bind' belongs in server"),
        ("zzz: 1", "zzz: unknown key; valid: model, strategy, "),
        ("token: abc", "token: a secret does not belong here"),
    ],
)
def test_a_wrong_line_says_what_is_right(refusal: Refusal, line: str, message: str) -> None:
    error = refusal(f"{HEAD}    {line}\n")
    assert f"moorage.yaml:4:5: deployments.laptop.{message}" in _without_columns(error)
    assert len(error.problems) == 1


def test_a_kv_budget_below_one_context_names_its_line_whoever_set_the_context(
    refusal: Refusal,
) -> None:
    """Known only when the layers are joined: the context is the default's here."""
    error = refusal(f"{HEAD}    kv_tokens: 4095\n")
    (problem,) = error.problems
    assert problem.where == "moorage.yaml:4:5"
    assert problem.message == "kv_tokens is 4095; give 4096 (max_context) or more"


def _without_columns(error: ConfigError) -> str:
    """Every place as that of the line's key, whichever of its parts is meant."""
    (problem,) = error.problems
    assert problem.where.startswith("moorage.yaml:4:")
    return str(problem).replace(problem.where, "moorage.yaml:4:5", 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bind: localhost", "server.bind has no port; write for example 127.0.0.1:8000"),
        ("bind: :8000", "server.bind has no host; write 127.0.0.1:8000, or 0.0.0.0:8000"),
        ("bind: a:99999", "server.bind has the port '99999'; give 1 to 65535"),
        ("bind: 1.2.3:80", "server.bind has the host '1.2.3'"),
        ("bind: ::1:80", "server.bind has the host '::1'"),
        ("bind: 'unix:'", "server.bind has no socket path"),
        ("max_body: lots", "server.max_body is 'lots'; give a size such as 512MiB or 4GiB"),
        ("max_body: 1.5", "server.max_body is 1.5; give a size such as 512MiB or 4GiB"),
        ("threads: 3", "server.threads is 3; give 9 or more"),
        ("model: x", "server.model: unknown key; 'model' belongs in a deployment or in defaults"),
        ("port: 80", "server.port: unknown key; here it is 'bind'"),
        ("unknown_fields: refus", "server.unknown_fields is 'refus'; did you mean 'refuse'?"),
    ],
)
def test_a_wrong_line_of_the_server_block_says_what_is_right(
    refusal: Refusal, line: str, message: str
) -> None:
    error = refusal(f"version: 1\nserver:\n  {line}\ndeployments: {{a: }}\n")
    assert str(error).startswith(f"moorage.yaml:3:3: {message}")


@pytest.mark.parametrize("line", ["api_keys: [first-key]", "api_key: first-key"])
def test_an_api_key_in_the_file_says_where_it_belongs_and_is_not_printed(
    refusal: Refusal, line: str
) -> None:
    error = refusal(f"version: 1\nserver:\n  {line}\ndeployments: {{a: }}\n")
    assert "server.api_keys_file" in str(error)
    assert "MOORAGE_API_KEYS" in str(error)
    assert "first-key" not in str(error)


def test_a_token_anywhere_in_the_file_is_refused_and_not_printed(refusal: Refusal) -> None:
    token = "hf_" + "aB3" * 10
    error = refusal(f"{HEAD}    options: {{deep: [{{x: {token}}}]}}\n    zzz: 1\n")
    assert "options.deep[0].x: looks like a secret" in str(error)
    assert token not in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "moorage.yaml:1:1: the file is empty; `moorage config init --force` writes a starter"),
        ("# nothing\n", "moorage.yaml:1:1: the file is empty"),
        ("- a\n", "moorage.yaml:1:1: the file is a list; it must be keys and values"),
        ("hello\n", "moorage.yaml:1:1: the file is 'hello'; it must be keys and values"),
        ("deployments: {a: }\n", "moorage.yaml:1:1: version is missing; write version: 1"),
        ("version: 2\ndeployments: {a: }\n", "moorage.yaml:1:1: version is 2; this program reads"),
        ("version: '1'\ndeployments: {a: }\n", "moorage.yaml:1:1: version is '1'; this program"),
        ("version: 1\n", "moorage.yaml:1:1: deployments is missing; name at least one"),
        ("version: 1\ndeployments:\n", "moorage.yaml:2:1: deployments is empty; name at least one"),
        ("version: 1\ndeployments: {a b: }\n", "moorage.yaml:2:15: deployments.a b is no usable"),
        ("version: 1\ndeployments: {a: 1}\n", "moorage.yaml:2:15: deployments.a is 1; give a map"),
        ("version: 1\ndeployments: [a]\n", "moorage.yaml:2:1: deployments is a list; give a map"),
        ("version: 1\nmodel: a\ndeployments: {a: }\n", "moorage.yaml:2:1: model: unknown key; 'mo"),
        (
            "version: 1\ndeployment: riga\ndeployments: {rig: , laptop: }\n",
            "moorage.yaml:2:1: deployment: there is no deployment 'riga' in moorage.yaml; "
            "did you mean 'rig'? Valid: rig, laptop",
        ),
        (
            "version: 1\ndeployments: {rig: , laptop: }\n",
            "moorage.yaml:2:1: deployment is missing, and there are several: rig, laptop.",
        ),
    ],
)
def test_a_file_without_what_it_needs_says_so(refusal: Refusal, text: str, message: str) -> None:
    assert str(refusal(text)).startswith(message), str(refusal(text))
