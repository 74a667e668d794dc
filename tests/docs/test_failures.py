"""docs/failures.md has every class, where it is detected, and what a user would search for."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
CLASSES = [f"F{number}" for number in range(1, 23)]
SECTIONS = dict(re.findall(r"^## (F\d+)\n\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
NOT_YET = "Not yet"
SOURCES = [*(ROOT / "service").rglob("*.py"), *(ROOT / "plugins").glob("*.py")]
# what is said to be seen, that a reproduction with plain libraries meets
SEEN = {
    "F1": "is not on the expected device",
    "F2": "Cannot copy out of meta tensor; no data!",
    "F6": "is not on the expected device meta!",
    "F7": "Tensor.item() cannot be called on meta tensors",
    "F8": "lm_head.weight",
    "F9": "weight is on the meta device, we need a `value`",
    "F10": "weight is on the meta device, we need a `value`",
    "F12": "Some parameters are on the meta device because they were offloaded to the disk.",
    "F14": "shape '[32, 0]' is invalid",
    "F15": "details look at the above report",
    "F18": "You can't move a model that has some modules offload",
    "F19": "Cannot access accelerator device when none is",
}


def test_every_class_has_one_section_in_order():
    assert list(SECTIONS) == CLASSES
    assert re.findall(r"^## (\w+)", PAGE, re.MULTILINE) == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_a_section_says_what_is_seen_why_what_we_do_and_how_to_mend_it(name: str):
    section = SECTIONS[name]
    places = [
        section.find(part) for part in ("**You see**", "**Why.**", "**Moorage**", "**By hand")
    ]
    assert -1 not in places
    assert places == sorted(places)
    assert section.index(".\n") < places[0], "it begins with a sentence"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_is_detected_by_something_that_exists_or_not_yet(name: str):
    ours = SECTIONS[name].partition("**Moorage**")[2].partition("**By hand")[0]
    named = re.findall(r"`(service(?:\.\w+)+)`", ours)
    assert named or NOT_YET in ours
    for dotted in named:
        module, found = dotted, None
        while found is None:
            module = module.rpartition(".")[0]
            try:
                found = importlib.import_module(module)
            except ModuleNotFoundError:
                assert module, dotted
        for part in dotted.removeprefix(f"{module}.").split("."):
            found = getattr(found, part)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_an_error_names_is_not_called_undetected(name: str):
    raised = any(f'failure_class="{name}"' in path.read_text() for path in SOURCES)
    assert not (raised and NOT_YET in SECTIONS[name])


@pytest.mark.parametrize(("name", "words"), SEEN.items(), ids=SEEN.keys())
def test_the_words_of_the_libraries_are_those_that_a_reproduction_meets(name: str, words: str):
    assert words in " ".join(SECTIONS[name].split())
    number = f"{int(name[1:]):02}"
    (test,) = (ROOT / "tests/failures").glob(f"test_f{number}_*.py")
    assert words in test.read_text().replace("\\", "")


@pytest.mark.parametrize("page", ["docs/errors.md", "README.md"])
def test_the_pages_where_one_would_look_link_to_it(page: str):
    assert "failures.md)" in (ROOT / page).read_text(encoding="utf-8")


def test_there_is_one_table_of_classes_only():
    assert not re.search(r"^\| F\d+ \|", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_a_file_of_tests_and_a_trial_of_the_self_test(name: str):
    from service.testing.self_test.run import TRIALS

    assert name in {trial.failure_class for trial in TRIALS}
    (test,) = (ROOT / "tests/failures").glob(f"test_f{int(name[1:]):02}_*.py")
    assert test.read_text().startswith(f'"""{name}: ')
    assert "def test_plain_" in test.read_text(), "what plain libraries do comes first"


def test_the_table_at_the_top_names_every_class():
    table = PAGE.partition("## F1\n")[0]
    assert set(re.findall(r"\[(F\d+)\]\(#f\d+\)", table)) == set(CLASSES)
