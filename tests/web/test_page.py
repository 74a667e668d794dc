"""/: a page from files that are here. tests/browser has what it does in a browser."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from service.placement.checks import CHECKS
from service.web import page
from service.web.files import STATIC

ROOT = Path(__file__).resolve().parents[2]
OWN = sorted(path.name for path in page.PAGE.iterdir())
# what others wrote, by folder: the version, and the SHA-256 of each file
VENDORED = {
    "deep-chat": (
        "2.4.2",
        {
            "LICENSE": "12d11204300c461fc3ba872703c1f15e8dc8e07fb58a3111d476ae6903db5388",
            "bundled-licenses.txt": (
                "5a7edeb9b884257fd94a8c8e338130768b132c9f2f3de240ec5a8ce1e5fbd111"
            ),
            "deepChat.bundle.js": (
                "4be8e65b12c0678ccc06fd157a402be4dc7c01f910056166518781f1de2d6ad7"
            ),
        },
    ),
    "echarts": (
        "6.1.0",
        {
            "LICENSE": "634293835b43a6dd2094fa39182a3d9a6b9ca43b7fdb9ac354e8037af2a3093a",
            "NOTICE": "d491d358344f842685c1b1585970999db65fe30ecf7ef3867af8814f4016c016",
            "bundled-licenses.txt": (
                "6e4155f24c333e0b432cdfc13e263f01129a926f238c30093ebc319c73ca552e"
            ),
            "treemap.js": "2d5d0f1eb4c4e1b12a3ad35569f0b6606ad105995abecfdb0e75a0aa11267a85",
        },
    ),
}


@pytest.mark.parametrize("name", VENDORED)
def test_what_others_wrote_is_unchanged_and_has_its_licence(name):
    version, known = VENDORED[name]
    files = {path.name: path.read_bytes() for path in (STATIC / name).iterdir()}
    readme = files.pop("README.md").decode()
    assert {file: hashlib.sha256(data).hexdigest() for file, data in files.items()} == known
    assert version in readme
    package = json.loads((ROOT / "vendor" / "package.json").read_text(encoding="utf-8"))
    locked = json.loads((ROOT / "vendor" / "package-lock.json").read_text(encoding="utf-8"))
    assert package["dependencies"][name] == version
    assert locked["packages"][f"node_modules/{name}"]["version"] == version


def test_every_package_is_fetched_with_its_integrity():
    locked = json.loads((ROOT / "vendor" / "package-lock.json").read_text(encoding="utf-8"))
    packages = {name: facts for name, facts in locked["packages"].items() if name}
    assert packages
    assert all(facts["integrity"].startswith("sha512-") for facts in packages.values())


def named_by(client, text: str) -> set[str]:
    """Files of the page that a file names."""
    links = re.findall(r'(?:src|href)="(page/[^"]+)"', text)
    imports = re.findall(r'(?:from|import\() ?"\./([^"]+)"', text)
    return {link.removeprefix("page/") for link in links} | set(imports)


def test_everything_the_page_names_is_there_and_nothing_else_is(client):
    waiting, seen = named_by(client, client.get("/").get_data(as_text=True)), set()
    while waiting:
        name = waiting.pop()
        answer = client.get(f"/page/{name}")
        assert answer.status_code == 200, name
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert answer.content_type == f"{kind}; charset=utf-8"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        seen.add(name)
        if name in OWN:
            waiting |= named_by(client, answer.get_data(as_text=True)) - seen
    assert seen == set(page.FILES)


def test_the_page_may_ask_this_server_only_and_runs_nothing_inside(client):
    answer = client.get("/")
    policy = dict(
        part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe-inline" not in str(policy)
    text = answer.get_data(as_text=True)
    assert re.findall(r"<script(?! type=\"module\" src=)|<style|\son\w+=|\sstyle=", text) == []


@pytest.mark.parametrize("name", OWN)
def test_our_own_files_are_short_and_name_no_other_host(name):
    text = (page.PAGE / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    named = set(re.findall(r"\w+://[\w.]+", text))
    assert named <= {"http://www.w3.org"}, "a name of SVG, which nobody fetches"


def test_every_check_of_the_certificate_has_its_words():
    text = (page.PAGE / "checks.js").read_text(encoding="utf-8")
    assert set(re.findall(r"^  (\w+): ", text, re.MULTILINE)) == {name for name, _ in CHECKS}


def test_a_browser_asks_each_time_and_gets_a_file_again_only_if_it_changed(client):
    first = client.get("/page/app.js")
    assert first.headers["Cache-Control"] == "no-cache"
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    other = client.get("/page/app.js", headers={"If-None-Match": '"x"'})
    assert other.data == first.data


def test_the_page_is_open_and_what_it_shows_is_not(make_client):
    client = make_client(api_keys=["k"])
    assert client.get("/").status_code == 200
    assert client.get("/page/app.js").status_code == 200
    assert client.get("/placement").status_code == 401


@pytest.mark.parametrize("name", ["odd.js", "index.html", "..%2fpage.py", "LICENSE"])
def test_no_other_file_is_sent(client, name):
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 404
    assert answer.json["error"]["code"] == "not_found"


def test_a_failure_is_json_as_everywhere(client):
    assert client.post("/").json["error"]["code"] == "method_not_allowed"
