import sys
import threading
from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.loops import SETTLED
from benchmarks.loops import beside
from benchmarks.peers import Absent
from benchmarks.worker import Worker
from benchmarks.workload import Request
from service.cli.timing import Answer
from service.cli.timing import closed_loop

ROOT = Path(__file__).resolve().parents[2]


def test_no_more_than_the_streams_run_at_once_and_answers_keep_their_order():
    lock, running, most = threading.Lock(), 0, 0
    both = threading.Barrier(2, timeout=30)

    def one(request: Request, answer: Answer) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait()  # six requests, two at a time: ends only if two really run at once
        answer.tokens = request.tokens
        with lock:
            running -= 1

    answers = closed_loop([Request(n) for n in range(6)], 2, one)
    assert [answer.tokens for answer in answers] == list(range(6))
    assert most == 2


def test_what_an_engine_raises_is_its_answers_error():
    def one(request: Request, answer: Answer) -> None:
        raise KeyError("gone")

    assert closed_loop([Request(1)], 1, one)[0].error == "KeyError: 'gone'"


def test_the_foreground_is_sent_when_every_background_stream_runs():
    go_on = threading.Event()
    seen: list[int] = []

    def one(request: Request, answer: Answer) -> None:
        if request.tokens == 1:
            seen.append(len(running.times))
            go_on.set()
            return
        nonlocal_running(answer)
        for n in range(SETTLED):
            answer.times.append(float(n))
        assert go_on.wait(30)

    running = Answer(0.0)

    def nonlocal_running(answer: Answer) -> None:
        nonlocal running
        running = answer

    behind, front = beside([Request(100)], [Request(1)], one, wait_s=30)
    assert seen == [SETTLED]
    assert behind[0].error is None
    assert len(front) == 1


def test_a_background_that_fails_is_told():
    def one(request: Request, answer: Answer) -> None:
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError, match="no room"):
        beside([Request(100)], [Request(1)], one, wait_s=30)


def test_a_peer_that_is_not_installed_says_so(tmp_path: Path):
    with pytest.raises(Absent, match=r"docs/benchmarks\.md"):
        Worker("openvino fp16", tmp_path, context=8, streams=1, python=sys.executable, threads=1)


def test_every_peer_has_a_maker():
    assert "moorage" in peers.PEERS
    with pytest.raises(KeyError):
        peers.make("nobody", ROOT, context=1, streams=1)
