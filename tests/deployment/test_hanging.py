"""What hangs is named after the load timeout; meanwhile health and placement answer."""

import pytest

from service.errors import NotReady
from tests.deployment.conftest import Hanging
from tests.deployment.conftest import Make
from tests.deployment.conftest import end_of_loading
from tests.deployment.strategies import HANGS


@pytest.mark.parametrize("hook", HANGS)
def test_a_hook_that_hangs_is_named_after_the_load_timeout(
    make: Make, hanging: Hanging, hook: str
) -> None:
    name, _ = hanging(hook)
    watched = make(name, load_timeout_s=0.05, fallback=("cpu",))
    deployment = watched.settle()
    assert deployment.state == "failed"
    [error] = watched.failures
    assert f"strategy {name} was not done within load_timeout_s: 0.05 s" in error.message
    assert error.hint is not None
    assert "load_timeout_s" in error.hint


@pytest.mark.parametrize("hook", HANGS)
def test_a_hook_that_comes_back_too_late_changes_nothing(
    make: Make, hanging: Hanging, hook: str
) -> None:
    name, gate = hanging(hook)
    watched = make(name, load_timeout_s=0.05, fallback=("cpu",))
    deployment = watched.settle()
    gate.open()
    end_of_loading()
    assert deployment.state == "failed"
    assert deployment.document()["attempts"] == []
    assert not watched.ready
    assert len(watched.failures) == 1
    with pytest.raises(NotReady):
        deployment.serving()


def test_while_it_loads_it_says_so_and_how_far(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("load")
    watched = make(name)
    deployment = watched.deployment
    deployment.start()
    gate.wait_until_reached()
    document = deployment.document()
    assert document["state"] == "loading"
    assert 0 <= document["progress"] < 0.9
    assert document["devices"][0]["measured"] is None
    assert document["certificate"] is None
    with pytest.raises(NotReady, match=r"The model is not ready: loading \d+%") as caught:
        deployment.serving()
    assert caught.value.retry_after_s
    gate.open()
    assert watched.wait().state == "ready"


def test_while_it_is_proven_it_does_not_answer(make: Make, hanging: Hanging) -> None:
    name, gate = hanging("validate")
    watched = make(name)
    deployment = watched.deployment
    deployment.start()
    gate.wait_until_reached()
    document = deployment.document()
    assert (document["state"], document["progress"]) == ("validating", 0.9)
    with pytest.raises(NotReady, match="The model is not ready: validating"):
        deployment.serving()
    gate.open()
    assert watched.wait().state == "ready"


def test_a_drain_while_it_loads_is_not_undone_by_the_end_of_the_load(
    make: Make, hanging: Hanging
) -> None:
    name, gate = hanging("load")
    watched = make(name)
    deployment = watched.deployment
    deployment.start()
    gate.wait_until_reached()
    deployment.drain(0.0)
    gate.open()
    end_of_loading()
    assert deployment.state == "draining"
    assert not watched.ready
    assert not watched.failures
