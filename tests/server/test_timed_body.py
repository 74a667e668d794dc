"""The time that reading one body may take in all."""

import io
from typing import Any

import pytest

from service.config import timed_body
from service.config.timed_body import TimedBody


class Slow:
    """A body whose every read takes two seconds of a clock that does not wait."""

    failed = False

    def __init__(self, data: bytes, clock: list[float], waking: dict[Any, float]) -> None:
        self._data = io.BytesIO(data)
        self._clock = clock
        self._waking = waking
        self.woken_at: list[float] = []

    def read(self, size: int | None = None) -> bytes:
        self.woken_at.append(self._waking["connection"])
        self._clock[0] += 2
        return self._data.read(-1 if size is None else size)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(timed_body.time, "monotonic", lambda: now[0])
    return now


def test_reads_share_one_time_and_none_follows_when_it_is_used_up(clock: list[float]) -> None:
    waking: dict[Any, float] = {}
    slow = Slow(b"abcdef", clock, waking)
    body = TimedBody(slow, "connection", waking, 5.0)
    assert (body.read(1), body.read(2)) == (b"a", b"bc")
    assert waking == {}, "nobody is woken while the application works"
    clock[0] += 1000  # what the application does in between does not count
    assert not body.failed
    with pytest.raises(TimeoutError):
        body.read(1)
    assert body.failed
    assert slow.woken_at == [105.0, 105.0, 1105.0]
    with pytest.raises(TimeoutError):
        body.read(1)
    assert len(slow.woken_at) == 3


def test_in_time_it_is_the_body() -> None:
    waking: dict[Any, float] = {}

    def body() -> TimedBody:
        return TimedBody(io.BytesIO(b"one\ntwo\n"), "connection", waking, 60.0)

    assert body().read() == b"one\ntwo\n"
    assert body().readline() == b"one\n"
    assert body().readlines() == list(body()) == [b"one\n", b"two\n"]
    assert not body().failed
