"""Many clients at once: nothing is lost, nothing leaks, every stream ends."""

import random
import threading

import pytest

from service.engine.engine import Engine
from service.errors import EngineStopped
from service.errors import Overloaded
from service.errors import StepFailed
from tests.engine.scripted import WAIT_S
from tests.engine.scripted import ScriptedRunner
from tests.engine.scripted import fail_on
from tests.engine.scripted import greedy
from tests.engine.scripted import idle
from tests.engine.scripted import read_all

CLIENTS = 32
REQUESTS = 8
POISON = 97


def run_clients(clients: list[threading.Thread]) -> None:
    for client in clients:
        client.start()
    for client in clients:
        client.join(WAIT_S)
    assert not any(client.is_alive() for client in clients)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("paged", "kv_tokens"), [(False, None), (True, None), (True, 128)])
def test_thirty_two_clients_submit_read_cancel_and_fail_at_once(
    paged: bool, kv_tokens: int | None
) -> None:
    runner = ScriptedRunner(
        before_step=fail_on(POISON, RuntimeError("poison")),
        max_sequences=4,
        step_tokens=8,
        paged=paged,
        kv_tokens=kv_tokens,
    )
    engine = Engine(runner, max_queue=20)
    engine.start()
    problems: list[str] = []
    outcomes: list[str] = []

    def client(number: int) -> None:
        luck = random.Random(number)
        for _ in range(REQUESTS):
            outcomes.append(request(luck))

    def request(luck: random.Random) -> str:
        first = luck.randrange(40)
        length, max_tokens = luck.randrange(1, 12), luck.randrange(1, 20)
        kind = luck.choice(["read", "read", "cancel", "abandon", "fail"])
        prompt = [first] * length
        if kind == "fail":
            prompt[-1] = POISON
        try:
            stream = engine.submit(prompt, greedy(max_tokens))
        except Overloaded:
            return "overloaded"
        if kind == "cancel":
            stream.cancel()
        if kind == "abandon":
            stream.read(WAIT_S)
            stream.cancel()
        expected = list(range(first + 1, first + 1 + max_tokens))
        try:
            tokens = read_all(stream)
        except StepFailed:
            if kind != "fail":
                problems.append(f"{kind} got another one's failure")
            return "failed"
        if kind == "read" and (tokens, stream.finish_reason) != (expected, "length"):
            problems.append(f"read {tokens} instead of {expected}")
        if kind in ("cancel", "abandon") and stream.finish_reason not in ("cancelled", "length"):
            problems.append(f"{kind} ended with {stream.finish_reason}")
        if kind == "fail":
            problems.append("a poisoned prompt was answered")
        return kind

    run_clients([threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)])
    assert problems == []
    assert len(outcomes) == CLIENTS * REQUESTS
    assert {"read", "cancel", "abandon", "failed"} <= set(outcomes)
    assert idle(engine)
    assert engine.alive
    engine.close()
    assert runner.memory.used_tokens == 0
    assert len(runner.threads) == 1


def test_a_close_in_the_middle_ends_everything_that_was_accepted() -> None:
    runner = ScriptedRunner(capacity=10**6, max_sequences=4)
    engine = Engine(runner, max_queue=CLIENTS)
    engine.start()
    reading = threading.Barrier(CLIENTS + 1)
    ended: list[str] = []

    def client() -> None:
        stream = engine.submit([1], greedy(10**5))
        reading.wait(WAIT_S)
        try:
            read_all(stream)
        except EngineStopped:
            ended.append("stopped")

    clients = [threading.Thread(target=client) for _ in range(CLIENTS)]
    closer = threading.Thread(target=lambda: (reading.wait(WAIT_S), engine.close()))
    run_clients([*clients, closer])
    assert ended == ["stopped"] * CLIENTS
    assert runner.memory.used_tokens == 0
