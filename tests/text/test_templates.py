"""Chat templates run elsewhere: what they cost, and what they can do there."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from service.errors import InvalidRequest
from service.errors import Overloaded
from service.text import template_process
from service.text import templates
from service.text.templates import Renderer
from tests.support.server import environment
from tests.support.templates import TEMPLATES
from tests.support.tiny import CHATML
from tests.support.tiny import tiny_tokenizer

HELLO = [{"role": "user", "content": "Hi €"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    made = Renderer()
    yield made
    made.close()


def ask(renderer: Renderer, template: str, **more: Any) -> str:
    request = {"template": template, "messages": HELLO, "tools": [], "prompt": True, "special": {}}
    return renderer.render(request | more)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (10 ** 9) % 2 }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(60) }}",
    ],
    ids=["loops", "power", "macros"],
)
def test_a_template_that_loops_for_ever_is_ended_and_the_next_works(
    renderer, template, monkeypatch
):
    assert ask(renderer, "ok") == "ok"
    monkeypatch.setattr(templates, "RENDER_S", 0.3)
    with pytest.raises(InvalidRequest, match=r"fails on the messages: it took longer than 0.3 s"):
        ask(renderer, template)
    monkeypatch.undo()
    assert ask(renderer, "{{ messages[0].content }}") == "Hi €"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{{ ('%1000000000d' % 1) ~ ('%1000000000d' % 1) }}",
        "{{ '{:>3000000000}'.format(1) }}",
        "{% set ns = namespace(l=['x']) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}"
        "{% endfor %}{{ ns.l | string | length }}",
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}{{ ns.s }}",
    ],
    ids=["times", "width", "format", "nested", "doubling"],
)
def test_a_template_that_fills_the_memory_fails_alone(renderer, template, monkeypatch):
    assert ask(renderer, "ok") == "ok"
    before = psutil.Process().memory_info().rss
    monkeypatch.setattr(templates, "RENDER_S", 2.0)
    with pytest.raises(InvalidRequest, match="chat template of this model fails") as caught:
        ask(renderer, template)
    assert "MemoryError" in caught.value.message or "longer than" in caught.value.message
    assert psutil.Process().memory_info().rss - before < 2**28
    monkeypatch.undo()
    assert ask(renderer, "ok") == "ok"


def test_a_text_that_is_too_long_is_refused_there(renderer):
    with pytest.raises(InvalidRequest, match="too long a text"):
        ask(renderer, "{{ messages[0].role * 10000000 }}")


def test_what_it_may_see_has_no_key_of_this_server(renderer, monkeypatch):
    monkeypatch.setenv("MOORAGE_API_KEYS", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    renderer.close()
    assert ask(renderer, "ok") == "ok"
    process = renderer._process
    assert process is not None
    seen = psutil.Process(process.pid).environ()
    assert "secret" not in seen.values()
    assert set(seen) <= {*templates.PASSED_ON}


def test_it_ends_when_nobody_can_ask_it_any_more(renderer):
    assert ask(renderer, "ok") == "ok"
    process = renderer._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert ask(renderer, "ok") == "ok"


def test_a_process_that_was_killed_is_replaced(renderer):
    assert ask(renderer, "ok") == "ok"
    process = renderer._process
    assert process is not None
    process.kill()
    process.wait(60)
    assert ask(renderer, "ok") == "ok"


def test_while_others_keep_it_busy_requests_are_turned_away(monkeypatch):
    monkeypatch.setattr(templates, "RENDER_S", 0.01)
    made = Renderer()
    with made._busy, pytest.raises(Overloaded):
        ask(made, "ok")


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, *TEMPLATES.values()])
def test_it_makes_what_transformers_makes(template: str, prompt: bool):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": "Be \U0001f600"}, *HELLO]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}]
    wanted = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=prompt, tokenize=False
    )
    assert templates.render(tokenizer, messages, tools, prompt=prompt) == wanted


def imported(module: str) -> str:
    """What a fresh process has of transformers when it has loaded that module of it."""
    code = (
        "import sys; from service.text import template_process as script;"
        f"script.TEMPLATES = {module!r};"
        "assert script.load_templates().__name__ == script.TEMPLATES;"
        "print('whole' if hasattr(sys.modules['transformers'], '__version__') else 'part')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_of_transformers_it_imports_the_templates_alone():
    assert imported(template_process.TEMPLATES) == "part"


def test_a_module_that_needs_the_rest_of_transformers_gets_it():
    assert imported("transformers.utils.hub") == "whole"


def test_the_time_zone_is_the_servers(renderer):
    assert len(ask(renderer, "{{ strftime_now('%Y-%m-%d') }}")) == len("2026-01-01")
    assert "TZ" in templates.PASSED_ON
