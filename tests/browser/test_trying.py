"""Trying the model: a chat, its settings, its key, and embeddings."""

import json
import re

import pytest
import requests
from playwright.sync_api import Page
from playwright.sync_api import expect

from tests.browser.conftest import KEY

SAID = "#try-said"
# what a browser itself writes to its console
NO_KEY = ("Failed to load resource: the server responded with a status of 401",)
FOCUSED = """() => {
    const node = document.activeElement.shadowRoot?.activeElement ?? document.activeElement;
    const said = node.labels?.[0]?.textContent ?? node.textContent.trim();
    return node.getAttribute("aria-label") ?? said;
}"""
REFUSED = ("Failed to load resource: the server responded with a status of 400",)


def ask(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Message").click()
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def most_tokens(page: Page, count: int) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Max tokens").fill(str(count))


def test_a_question_is_answered_piece_by_piece_with_its_numbers(url, visit):
    page = visit(url).page
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    most_tokens(page, 20)
    ask(page, "Say a.")
    log = page.get_by_role("log", name="Conversation")
    expect(log).to_contain_text("Say a.")
    expect(log).to_contain_text("a" * 20)
    said = page.locator(SAID)
    expect(said).to_contain_text("answer 20 tokens")
    expect(said).to_contain_text("cut off by max tokens or the context")
    expect(said).to_contain_text("tokens/s")
    messages = [{"role": "user", "content": "Say a."}]
    body = {"model": "model", "messages": messages}
    count = requests.post(f"{url}/tokenize", json=body, timeout=30).json()["count"]
    expect(said).to_contain_text(f"prompt {count} tokens")
    request_id = page.locator(f"{SAID} code").inner_text()
    assert len(request_id) == 32
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_it_remembers_what_was_said_and_forgets_it_when_told(url, visit):
    page = visit(url).page
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    most_tokens(page, 3)
    page.get_by_label("System prompt").fill("Be brief.")
    bodies = []
    page.on(
        "request", lambda r: bodies.append(r.post_data_json) if "completions" in r.url else None
    )
    for text in ("one", "two"):
        with page.expect_response("**/v1/chat/completions"):
            ask(page, text)
        expect(page.locator(SAID)).to_contain_text("cut off")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert [turn["role"] for turn in bodies[1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert bodies[1]["messages"][2]["content"] == "aaa"
    assert bodies[1]["max_tokens"] == 3
    assert "temperature" not in bodies[1], "an empty setting is not sent"
    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_role("log", name="Conversation")).not_to_contain_text("one")
    ask(page, "three")
    expect(page.locator(SAID)).to_contain_text("cut off")
    assert [turn["role"] for turn in bodies[2]["messages"]] == ["system", "user"]


def test_a_stop_ends_the_work_on_the_server_too(url, visit):
    page = visit(url).page
    ask(page, "Go on for long.")
    expect(page.get_by_role("log", name="Conversation")).to_contain_text("aaa")
    expect(page.locator("[data-of=requests]")).to_contain_text("1 running")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(SAID)).to_contain_text("stopped by you")
    expect(page.locator("[data-of=requests]")).to_contain_text("0 running")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_clearing_ends_an_answer_that_is_under_way(url, visit):
    page = visit(url).page
    ask(page, "Go on for long.")
    log = page.get_by_role("log", name="Conversation")
    expect(log).to_contain_text("aaa")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("[data-of=requests]")).to_contain_text("0 running")
    expect(log).not_to_contain_text("aaa")
    most_tokens(page, 3)
    ask(page, "Again.")
    expect(page.locator(SAID)).to_contain_text("answer 3 tokens")
    expect(log).to_contain_text("aaa")


def test_a_keyboard_is_enough(url, visit):
    page = visit(url).page
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate(FOCUSED)
        reached.append(focused)
        if focused == "Message":
            break
        if focused == "Settings":
            page.keyboard.press("Enter")
        if focused == "Max tokens":
            page.keyboard.type("5")
    assert reached[0] == "Skip to the model"
    assert reached[-1] == "Message"
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(page.locator(SAID)).to_contain_text("answer 5 tokens")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED) == "Send"


def test_what_the_server_refuses_is_said_in_its_words(url, visit):
    page = visit(url, expected=REFUSED).page
    ask(page, "A control token: <|im_end|>")
    expect(page.get_by_role("log", name="Conversation")).to_contain_text("<|im_end|>")
    expect(page.get_by_role("log", name="Conversation")).to_contain_text(
        "control token of this model."
    )


def test_what_a_model_writes_runs_nothing_and_fetches_nothing(url, visit):
    """Script, HTML and a link that runs are text; a picture of another host is not fetched."""
    picture = "http://elsewhere.example/x.png"
    said = (
        f"<img src=x onerror=alert(1)> <script>alert(2)</script> ![picture]({picture})"
        " [link](javascript:alert(3))\n\n| left | right |\n| :-- | --: |\n| 1 | 2 |\n"
    )
    chunk = {"choices": [{"delta": {"content": said}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    watched = visit(url, expected=("Loading the image",))
    page = watched.page
    page.on("dialog", lambda dialog: watched.said.append("a script ran"))
    page.route(
        "**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream")
    )
    ask(page, "Do your worst.")
    log = page.get_by_role("log", name="Conversation")
    expect(log.get_by_role("cell", name="2", exact=True)).to_have_css("text-align", "right")
    expect(log).to_contain_text("<script>alert(2)</script>")
    expect(log.locator("script, [onerror], a[href^=javascript]")).to_have_count(0)
    page.wait_for_function("window.violations.length > 0")
    # the browser tells of a request that the policy did not let it send, too
    assert all(each.startswith(f"img-src {picture}") for each in watched.forbidden())
    watched.asked = [address for address in watched.asked if not address.startswith(picture)]


@pytest.mark.parametrize("title", ["curl", "Python"])
def test_a_request_can_be_copied(url, visit, title):
    page = visit(url).page
    page.get_by_role("button", name=title, exact=True).click()
    dialog = page.get_by_role("dialog", name=f"As {title}")
    expect(dialog.get_by_role("textbox")).to_have_value(re.compile(f"{url}/v1"))
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()


def test_a_server_with_a_key_shows_nothing_before_it_is_given(locked_url, visit):
    watched = visit(locked_url, expected=NO_KEY)
    page = watched.page
    field = page.get_by_label("This server needs an API key.")
    expect(field).to_be_focused()
    expect(page.locator("#state")).to_have_text("Locked")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-said")).to_contain_text("not known")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_text("Ready")
    expect(field).to_be_hidden()
    kept = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    )
    assert kept == '[{},{},""]'
    assert KEY not in page.content()
    assert not any(KEY in url for url in watched.asked)
    page.get_by_role("button", name="Forget the key").click()
    expect(page.locator("#state")).to_have_text("Locked")


def test_a_model_that_embeds_compares_texts_instead(locked_url, visit):
    page = visit(locked_url, expected=NO_KEY).page
    page.get_by_label("This server needs an API key.").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_text("This model does not chat")).to_be_visible()
    page.get_by_label("This text").fill("the same")
    page.get_by_label("and this one").fill("the same")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".alike")).to_contain_text("1.0000 cosine similarity")
    expect(page.locator(SAID)).to_contain_text("16 tokens")
    page.get_by_role("button", name="curl").click()
    text = page.get_by_role("dialog", name="As curl").get_by_role("textbox").input_value()
    assert KEY not in text
    assert "$MOORAGE_API_KEY" in text
