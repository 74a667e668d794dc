"""Formats of calls are learned from chat templates, forced by grammars, and read back."""

import json
from typing import Any

import pytest

from service.errors import InvalidRequest
from service.errors import UnsupportedParameter
from service.text.answer import AnswerReader
from service.text.answer import Delta
from service.text.answer import reading
from service.text.chat import render
from service.text.constraints import Grammars
from service.text.tools import ToolFormat
from service.text.tools import forced_calls
from service.text.tools import tool_use
from tests.support.templates import HERMES
from tests.support.templates import tool_tokenizer
from tests.support.templates import weather
from tests.support.tiny import IM_END
from tests.support.tiny import VOCAB
from tests.support.tiny import tiny_tokenizer
from tests.text.test_constraints import say

FAMILIES = ["hermes", "llama", "mistral"]
ROME, OSLO = ("weather", '{"city": "Rome"}'), ("weather", '{"city": "O\\"}slo"}')


def form_of(family: str) -> ToolFormat:
    form = tool_use(tool_tokenizer(family)).format
    assert form is not None
    return form


def read(reader: AnswerReader, text: str, size: int) -> list[Delta]:
    deltas = []
    for at in range(0, len(text), size):
        deltas += reader.feed(text[at : at + size])
    return deltas + reader.finish()


def content(deltas: list[Delta]) -> str:
    return "".join(delta.content for delta in deltas)


def calls(deltas: list[Delta]) -> list[tuple[str, Any]]:
    found: dict[int, list[str]] = {}
    for delta in deltas:
        if delta.call is not None:
            if delta.call.name is not None:
                assert delta.call.id
                found[delta.call.index] = [delta.call.name, ""]
            found[delta.call.index][1] += delta.call.arguments
    return [(name, json.loads(arguments)) for name, arguments in found.values()]


def test_formats_are_learned_from_templates():
    assert form_of("hermes") == ToolFormat(
        "", '<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", "\n", ""
    )
    llama = form_of("llama")
    assert (llama.before, llama.between, llama.joint) == ('{"name": "', '", "parameters": ', None)
    mistral = form_of("mistral")
    assert (mistral.opening, mistral.joint, mistral.closing) == ("[TOOL_CALLS] [", ", ", "]")


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_that_know_tools_are_known(family):
    use = tool_use(tool_tokenizer(family))
    assert (use.shown, use.calls, use.results) == (True, True, True)


def test_a_template_that_knows_no_tools_is_known():
    use = tool_use(tiny_tokenizer())
    assert (use.shown, use.calls, use.results, use.format) == (False, False, False, None)


def test_a_template_that_thinks_before_it_calls_teaches_the_same_format():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HERMES.replace(
        "{%- if message.tool_calls %}",
        "{%- if message.tool_calls %}{{- '<think>\n\n</think>\n\n' }}",
    )
    assert tool_use(tokenizer).format == form_of("hermes")


def test_arguments_that_are_not_json_are_not_forced():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HERMES.replace(
        "tool_call.function.arguments | tojson", "tool_call.function.arguments | items | list"
    )
    use = tool_use(tokenizer)
    assert use.format is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read_however_the_text_is_cut(family, size):
    form = form_of(family)
    wanted = [ROME, OSLO] if form.joint is not None else [OSLO]
    how = reading(tool_tokenizer(family), "prompt", [weather()])
    assert how is not None
    reader = how.reader()
    deltas = read(reader, form.write(wanted), size)
    assert calls(deltas) == [(name, json.loads(arguments)) for name, arguments in wanted]
    assert content(deltas) == ""
    assert reader.calls == len(wanted)


def test_arguments_come_as_they_are_written():
    how = reading(tool_tokenizer("hermes"), "prompt", [weather()])
    assert how is not None
    reader = how.reader()
    reader.feed('<tool_call>\n{"name": "weather", "arguments": {"ci')
    assert [d.call.arguments for d in reader.feed('ty": "Ro') if d.call] == ['ty": "Ro']


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text",
    [
        "plain text\n",
        "  first a space",
        "<tool_call>zonk</tool_call> and more",
        "[TOOL_CALLS] nope",
        '{"a": 1} and so on',
        "<",
        '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>',
    ],
)
def test_what_is_no_call_stays_text(family, text):
    how = reading(tool_tokenizer(family), "prompt", [weather()])
    assert how is not None
    reader = how.reader()
    deltas = read(reader, text, 4)
    assert content(deltas).split() == text.split()
    assert reader.calls == 0


def test_a_call_that_was_cut_off_keeps_what_it_has():
    how = reading(tool_tokenizer("hermes"), "prompt", [weather()])
    assert how is not None
    text = form_of("hermes").write([ROME])
    deltas = read(how.reader(), text[: text.index("Rome") + 2], 4)
    assert "".join(d.call.arguments for d in deltas if d.call) == '{"city": "Ro'


def test_text_before_a_call_is_told_and_what_parts_them_is_not():
    how = reading(tool_tokenizer("hermes"), "prompt", [weather()])
    assert how is not None
    deltas = read(how.reader(), "Let me see.\n\n" + form_of("hermes").write([ROME]), 5)
    assert content(deltas) == "Let me see."
    assert len(calls(deltas)) == 1


def test_thoughts_are_told_apart_where_the_template_has_them():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# <think> </think> #}"
    for prompt, text in (("...", "<think>\nhm\n</think>\n\nYes."), ("<think>\n", "hm</think>Yes.")):
        how = reading(tokenizer, prompt)
        assert how is not None
        deltas = read(how.reader(), text, 3)
        assert "".join(d.reasoning for d in deltas).strip() == "hm"
        assert content(deltas) == "Yes."


def test_a_template_that_opens_the_thoughts_itself_teaches_the_same_format():
    tokenizer = tool_tokenizer("hermes")
    tokenizer.chat_template += "{%- if add_generation_prompt %}{{- '<think>\n' }}{%- endif %}"
    assert tool_use(tokenizer).format == form_of("hermes")


def test_white_space_at_the_ends_of_thoughts_is_not_told():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# <think> </think> #}"
    for text, thought in (
        ("<think>\n\nhm, \n so\n\n</think>\n\nYes.", "hm, \n so"),
        ("<think>\n\n</think>\n\nYes.", ""),
        ("<think> a", "a"),
    ):
        for size in (1, 2, 5):
            how = reading(tokenizer, "...")
            assert how is not None
            assert how.thinks
            deltas = read(how.reader(), text, size)
            assert "".join(d.reasoning for d in deltas) == thought
            assert all(d.reasoning or d.content for d in deltas)


def test_tokens_of_thoughts_are_counted_with_their_marks():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# <think> </think> #}"
    for prompt, steps in (
        ("...", ["<think>", "\n", "hm", "", " so", "\n", "</think>", "Yes", "."]),
        ("...<think>\n", ["hm", " so", "\n", "\n", "", "</", "think>", "Yes", "."]),
    ):
        how = reading(tokenizer, prompt)
        assert how is not None
        reader = how.reader()
        for step in steps:
            reader.feed(step, 1)
        reader.finish()
        assert reader.thought_tokens == 7


def test_a_plain_model_is_not_read_at_all():
    assert reading(tiny_tokenizer(), "prompt") is None
    assert reading(tool_tokenizer("hermes"), "prompt") is None


def test_the_tokenizers_own_template_is_used():
    tokenizer = tiny_tokenizer()
    call = {"name": "{name}", "arguments": "{content}"}
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": {"open": "<t>", "close": "</t>"},
            "tool_calls": {
                "open_pattern": r"<call (?P<name>\w+)>",
                "close": "</call>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": call},
            },
            "content": {},
        },
    }
    how = reading(tokenizer, "<|im_start|>assistant\n", [weather()])
    assert how is not None
    text = '<t>hm</t>Yes <call weather>{"city": "Rome"}</call>'
    deltas = read(how.reader(), text, 4)
    assert calls(deltas) == [("weather", {"city": "Rome"})]
    assert content(deltas) == "Yes"
    assert "".join(d.reasoning for d in deltas) == "hm"
    broken = how.reader()
    assert content(read(broken, "<call weather>zonk</call> on", 4)).endswith(" on")
    assert broken.calls == 0


def grammar_for(family: str, **changes: Any) -> Any:
    tokenizer = tool_tokenizer(family)
    options = {"parallel": True, "thinking": False, "param": "tools", **changes}
    text = forced_calls(tokenizer, form_of(family), [weather(strict=True)], **options)
    return Grammars(tokenizer, VOCAB, frozenset({IM_END})).compile(text, "tools")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_is_one_that_can_be_read(family):
    grammar = grammar_for(family)
    text = form_of(family).write([ROME])
    constraint = grammar.constraint()
    assert not constraint.allowed()[IM_END]
    assert say(constraint, text) == len(text)
    assert constraint.allowed()[IM_END]
    assert say(grammar.constraint(), "hello") < 2
    assert say(grammar.constraint(), text.replace("city", "town")) < text.index("city") + 1
    assert say(grammar.constraint(), text.replace("weather", "whether")) < len(text)


@pytest.mark.parametrize(("parallel", "several"), [(True, True), (False, False)])
def test_several_calls_only_if_they_may_be_parallel(parallel, several):
    text = form_of("hermes").write([ROME, OSLO])
    reached = say(grammar_for("hermes", parallel=parallel).constraint(), text)
    assert (reached == len(text.encode())) is several


def test_thoughts_come_before_forced_calls():
    constraint = grammar_for("hermes", thinking=True).constraint()
    text = "hm</think>\n\n" + form_of("hermes").write([ROME])
    assert say(constraint, text) == len(text)


@pytest.mark.parametrize("family", ["hermes", "mistral"])
def test_a_free_answer_is_text_or_a_call_that_follows_its_schema(family):
    grammar = grammar_for(family, free=True)
    call = form_of(family).write([ROME])
    for text in ("hello {", "Well. " + call):
        constraint = grammar.constraint()
        assert say(constraint, text) == len(text)
        assert constraint.allowed()[IM_END]
    wrong = "Well. " + call.replace("city", "town")
    assert say(grammar.constraint(), wrong) < len(wrong)


def test_free_calls_without_a_mark_cannot_be_strict():
    with pytest.raises(UnsupportedParameter, match="tool_choice"):
        grammar_for("llama", free=True)


def test_control_tokens_in_a_format_are_forced_by_their_ids():
    tokenizer = tool_tokenizer("hermes")
    form = ToolFormat("<|im_start|>", '{"n": "', '", "a": ', "}", None, "")
    options: dict[str, Any] = {"parallel": False, "thinking": False, "param": "tools"}
    text = forced_calls(tokenizer, form, [weather()], **options)
    constraint = Grammars(tokenizer, VOCAB, frozenset({IM_END})).compile(text, "t").constraint()
    assert constraint.allowed().nonzero().flatten().tolist() == [256]
    constraint.accept(256)
    assert constraint.allowed()[ord("{")]


def test_tools_and_calls_cannot_smuggle_control_tokens():
    tokenizer = tool_tokenizer("hermes")
    user = {"role": "user", "content": "hi"}
    tool = weather()
    tool["function"]["parameters"]["properties"]["<|im_end|>"] = {}
    with pytest.raises(InvalidRequest, match="control token") as caught:
        render(tokenizer, [user], 400, [tool])
    assert caught.value.param == "tools[0]"
    call = {"function": {"name": "weather", "arguments": {"a": ["<|im_end|>"]}}}
    with pytest.raises(InvalidRequest) as caught:
        render(tokenizer, [user, {"role": "assistant", "content": "", "tool_calls": [call]}], 400)
    assert caught.value.param == "messages[1].tool_calls"
