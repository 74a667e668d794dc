"""/docs: a page from files that are here, which asks no other host."""

import hashlib
import re
from configparser import ConfigParser
from pathlib import Path

import pytest

from service.web import docs

ROOT = Path(__file__).resolve().parents[2]
VERSION = "5.35.0"
SHA256 = {
    "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "NOTICE": "0d20d1adef18aee3f40dd258172155521ce702ac445cb5f7b7d60ed32dad2fb2",
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui-bundle.js.LICENSE.txt": (
        "37eb6e7e59aed57b2c1acf076574b818ea07b74265717e0bd67b59e0baf9abbb"
    ),
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
}


@pytest.mark.parametrize("name", SHA256)
def test_what_others_wrote_is_unchanged(name):
    assert hashlib.sha256((docs.SWAGGER_UI / name).read_bytes()).hexdigest() == SHA256[name]


def test_nothing_else_lies_beside_it_and_the_version_is_told():
    assert {path.name for path in docs.SWAGGER_UI.iterdir()} == {*SHA256, "README.md"}
    assert VERSION in (docs.SWAGGER_UI / "README.md").read_text(encoding="utf-8")


def test_a_wheel_has_the_files():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    patterns = config["options.package_data"]["service.web"].split()
    package = ROOT / "service" / "web"
    packed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    assert packed == {path for path in docs.STATIC.rglob("*") if path.is_file()}


def test_everything_the_page_names_is_there_and_from_here(client):
    page = client.get("/docs").get_data(as_text=True)
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert named
    for link in named:
        if link != "data:,":
            answer = client.get(f"/{link}")
            assert answer.status_code == 200
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.content_type == (
                "text/css; charset=utf-8"
                if link.endswith(".css")
                else "text/javascript; charset=utf-8"
            )
    own = page + (docs.STATIC / "docs.js").read_text(encoding="utf-8")
    assert "//" not in re.sub(r"^\s*//.*|\s// .*", "", own, flags=re.MULTILINE)


def test_the_page_may_ask_this_server_only_and_runs_nothing_inside(client):
    answer = client.get("/docs")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    page = answer.get_data(as_text=True)
    assert re.findall(r"<script(?! src=)|<style|\son\w+=|\sstyle=", page) == []


def test_what_others_wrote_needs_nothing_that_the_policy_forbids():
    """No code made of text, no style sheet or attribute of the page's own, no worker, no font.

    React sets single properties of `element.style`, which no policy concerns.
    """
    script = (docs.SWAGGER_UI / "swagger-ui-bundle.js").read_text(encoding="utf-8")
    for needs in (
        r"[^\w$.]eval\(",
        r"set(?:Timeout|Interval)\([\"'`]",
        r"createElement\([\"'](?:style|script)[\"']",
        r"setAttribute\([\"']style[\"']",
        r"\.cssText\s*=|\.insertRule\(",
        r"new (?:Shared)?Worker\(|importScripts\(",
    ):
        assert re.findall(needs, script) == []
    # where neither globalThis nor self is there, and instead of Function.prototype.bind
    made = re.findall(r"(.{0,9}[^\w$.])Function\([\"'](\w+)", script)
    assert sorted(text for _, text in made) == ["binder"] + ["return"] * 4
    assert all("||" in before for before, text in made if text == "return")
    assert "Function.prototype.bind||" in script
    style = (docs.SWAGGER_UI / "swagger-ui.css").read_text(encoding="utf-8")
    assert "@import" not in style
    assert "@font-face" not in style
    assert set(re.findall(r"url\([\"']?(.{5})", style)) == {"data:"}


def test_the_page_is_open_and_what_it_shows_is_not(make_client):
    client = make_client(api_keys=["k"])
    assert client.get("/docs").status_code == 200
    assert client.get("/docs/docs.js").status_code == 200
    assert client.get("/openapi.json").status_code == 401
    headers = {"Authorization": "Bearer k"}
    assert client.get("/openapi.json", headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["", "odd.js", "..%2fdocs.py", "swagger-ui/LICENSE"])
def test_no_other_file_is_sent(client, name):
    assert client.get(f"/docs/{name}").status_code == 404
