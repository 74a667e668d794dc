"""The live placement, on a real server and in states that no server stays in for long."""

import json
import re
from collections.abc import Iterator

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.browser.conftest import open_gate
from tests.browser.conftest import talking
from tests.support.server import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Its first strategy fails the certificate; the one it falls back to waits for its gate."""
    folder = tmp_path_factory.mktemp("gated")
    with talking(folder, strategy="forgetful", fallback=["talking"]) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def url(server: Server) -> str:
    open_gate(server)
    return server.wait_ready()


# first, because a server loads once
def test_while_it_loads_the_page_says_so_and_goes_on_by_itself(server, visit):
    page = visit(server.url()).page
    expect(page.locator("#state")).to_have_text("Loading")
    expect(page.get_by_role("progressbar")).to_be_visible()
    expect(page.locator("#try-note")).to_contain_text("You can ask as soon as")
    expect(page.locator("#proof")).to_contain_text("Not proven yet")
    expect(page.locator(".device .bar").nth(1)).to_have_accessible_name("measured: not yet")
    open_gate(server)
    expect(page.locator("#state")).to_have_text("Ready")
    expect(page.get_by_role("progressbar")).to_be_hidden()
    expect(page.locator("#try-note")).to_be_hidden()
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    expect(page.locator("#proof")).to_contain_text("Proven")


def test_a_strategy_that_failed_the_certificate_is_told_with_its_reason(url, visit):
    page = visit(url).page
    tried = page.get_by_role("list").filter(has_text="forgetful")
    expect(tried).to_contain_text("was refused at the certificate")
    expect(tried).to_contain_text("model.norm.weight was left on meta (F1)")


def test_devices_have_the_numbers_of_the_placement(url, visit):
    planned = requests.get(f"{url}/placement", timeout=30).json()["devices"][0]["planned"]
    page = visit(url).page
    table = page.get_by_role("article", name="Device cpu").get_by_role("table")
    weights = table.get_by_role("row", name="Weights").get_by_role("cell").first
    expect(weights).to_have_attribute("title", f"{planned['weights']:,} bytes")
    overhead = table.get_by_role("row", name="Overhead").get_by_role("cell").first
    expect(overhead).to_have_attribute("title", f"{planned['overhead']:,} bytes")
    bar = page.locator(".device .bar").first
    expect(bar).to_have_accessible_name(re.compile("planned: .*Weights .*KV reserved"))


def test_modules_open_with_a_treemap_and_the_reason_for_each_place(url, visit):
    page = visit(url).page
    page.get_by_role("button", name="modules on cpu").click()
    expect(page.locator(".treemap canvas")).to_be_visible()
    expect(page.locator(".why")).to_contain_text("nothing else computes in this plan")
    page.get_by_role("button", name="lm_head").click()
    expect(page.locator(".why")).to_contain_text("lm_head has")
    expect(page.get_by_role("button", name="lm_head")).to_have_attribute("aria-pressed", "true")


def test_a_click_into_the_treemap_chooses_that_module(url, visit):
    page = visit(url).page
    page.get_by_role("button", name="modules on cpu").click()
    page.get_by_role("button", name="model.norm").click()
    page.locator(".treemap canvas").click(position={"x": 60, "y": 60})
    expect(page.locator(".why")).not_to_contain_text("model.norm")


def test_the_certificate_lists_every_check_with_what_it_says(url, visit):
    checks = requests.get(f"{url}/placement", timeout=30).json()["certificate"]["checks"]
    page = visit(url).page
    page.get_by_text("Every check").click()
    rows = page.get_by_role("region", name="Checks").locator("tbody tr")
    expect(rows).to_have_count(len(checks))
    said = rows.locator("td:nth-child(3)").all_inner_texts()
    assert all(said), "a check without words"


def test_a_certificate_that_is_not_valid_any_more_stands_out(url, visit):
    page = visit(url).page
    expect(page.locator("#state")).to_have_text("Ready")
    said = "model.norm.weight was torch.float32, is torch.float16 (F18)"
    document = requests.get(f"{url}/placement", timeout=30).json()
    finding = {"name": "model.norm.weight", "was": "torch.float32", "now": "torch.float16"}
    document["state"] = "degraded"
    document["certificate"] |= {"valid": False, "revoked": said}
    document["watch"] |= {"changed": 1, "findings": [finding], "checks": 3}
    document["watch"]["checked_at"] = document["certificate"]["issued_at"]
    page.route("**/placement", lambda route: route.fulfill(body=json.dumps(document)))
    expect(page.locator("#state")).to_have_text("Degraded: the model changed")
    expect(page.locator("#proof")).to_contain_text("Not valid")
    expect(page.locator("#proof")).to_contain_text(said)
    expect(page.locator("#watch")).to_contain_text("1 changed")
    expect(page.locator("#watch")).to_contain_text("was torch.float32, is torch.float16")
    expect(page.locator("#try-note")).to_contain_text("not what was proven")


def test_a_check_that_failed_is_open_with_its_message(url, visit):
    page = visit(url).page
    document = requests.get(f"{url}/placement", timeout=30).json()
    message = "lm_head.weight was left on meta (F1): never materialised"
    document["state"] = "failed"
    document["certificate"]["valid"] = False
    document["certificate"]["checks"][0] |= {"status": "fail", "message": message}
    document["error"] = {"message": message, "hint": "lower max_context", "failure_class": "F1"}
    page.route("**/placement", lambda route: route.fulfill(body=json.dumps(document)))
    expect(page.locator("#state")).to_have_text("Failed")
    expect(page.get_by_role("region", name="Checks")).to_contain_text(message)
    expect(page.locator("#error")).to_contain_text("What to do: lower max_context")


def test_a_server_that_is_gone_is_said_and_found_again(url, visit):
    watched = visit(url, expected=("Failed to load resource",))
    page = watched.page
    expect(page.locator("#state")).to_have_text("Ready")
    page.route("**/placement", lambda route: route.abort())
    expect(page.locator("#lost")).to_contain_text("The server has not answered since")
    expect(page.locator("#state")).to_have_text("No answer")
    page.unroute("**/placement")
    expect(page.locator("#lost")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("Ready")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_that_a_machine_can_find_bars_anybody(url, visit, scheme):
    page = visit(url, color_scheme=scheme).page
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    page.get_by_role("button", name="modules on cpu").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Every check").click()
    expect(page.locator(".treemap canvas")).to_be_visible()
    found = Axe().run(page).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []


@pytest.mark.parametrize("width", [320, 375, 800, 1440])
def test_it_is_never_wider_than_the_screen(url, visit, width):
    page = visit(url, viewport={"width": width, "height": 812}).page
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    page.get_by_role("button", name="modules on cpu").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_text("Every check").click()
    expect(page.locator(".treemap canvas")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_hidden_page_asks_seldom(url, visit):
    watched = visit(url)
    page = watched.page
    expect(page.locator("#state")).to_have_text("Ready")
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true})")
    # one look may be on its way
    page.wait_for_timeout(1500)
    before = len(watched.asked)
    page.wait_for_timeout(3000)
    assert len(watched.asked) - before <= 1
