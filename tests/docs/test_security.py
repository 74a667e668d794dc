"""docs/security.md names tests that exist, and promises nothing that has none."""

import ast
import re
from pathlib import Path

import pytest

from service.web.app import create_app
from tests.support.fake_deployment import FakeDeployment

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ROWS = re.findall(r"^\| (\*\*.*) \| (.*) \| (.*?) ?\|$", PAGE, re.MULTILINE)
DOES_NOT_APPLY = "does not apply"
SERVERS = ("vLLM", "TGI", "Ollama", "llama.cpp", "TorchServe", "Triton")


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_every_test_that_is_named_exists(path: str, name: str):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("threat", "done", "shown"), ROWS, ids=[row[0][:40] for row in ROWS])
def test_every_row_has_a_test_or_does_not_apply(threat: str, done: str, shown: str):
    assert bool(re.search(r"`tests/.*::\w+`", shown)) != (DOES_NOT_APPLY in done)


def test_every_server_that_has_had_such_holes_is_looked_at():
    assert len(ROWS) >= 20
    table = " ".join(row[0] for row in ROWS)
    assert [name for name in SERVERS if name not in table] == []


def test_there_is_no_route_that_changes_anything():
    app = create_app(FakeDeployment())
    posts = {rule.rule for rule in app.url_map.iter_rules() if "POST" in (rule.methods or ())}
    # Each of these only computes an answer. A route that does more belongs elsewhere.
    computing = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"}
    assert posts <= computing | {"/tokenize", "/detokenize"}
    for rule in app.url_map.iter_rules():
        refused = rule.endpoint == "delete_response"  # always 404: nothing is stored
        assert refused or not {"PUT", "PATCH", "DELETE"} & (rule.methods or set()), rule
