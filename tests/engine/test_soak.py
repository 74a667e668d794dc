"""Ten thousand short requests, as clients make them: nothing stays behind."""

import ctypes
import gc
import random
import sys
import threading
import time
import tracemalloc

import psutil
import pytest

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.sequence import Stream
from service.errors import DeadlineExceeded
from service.errors import Overloaded
from tests.engine.models import engine_over
from tests.engine.models import model_of
from tests.engine.scripted import idle
from tests.engine.scripted import read_all

REQUESTS = 10_000
WARM_UP = 1_000
CLIENTS = 8
# What bookkeeping may grow by: it keeps the tokens of cached prompts, whose lengths vary.
GROWTH_BYTES = 400_000
# What the process may grow by, tensors included: measured are 0.3 to 0.9 MiB. A kilobyte lost with
# each request would be 9.
RESIDENT_BYTES = 6 * 2**20


def one_request(engine: Engine, luck: random.Random) -> str:
    """Ask, wait in one of several ways, and check the end. Returns what happened."""
    beginning = [luck.randrange(4)] * luck.choice([0, 20, 55, 70])
    prompt = [*beginning, *(luck.randrange(250) for _ in range(luck.randrange(1, 12)))]
    params = SamplingParams(
        max_tokens=luck.randrange(1, 12),
        temperature=luck.choice([0.0, 1.0]),
        top_p=luck.choice([1.0, 0.9]),
        presence_penalty=luck.choice([0.0, 0.5]),
        logprobs=luck.choice([None, None, 2]),
    )
    deadline = time.monotonic() + luck.choice([0.0, 0.01, 1000.0, 1000.0])
    try:
        streams = engine.submit_all(
            [(prompt, params)] * luck.choice([1, 1, 1, 2]), deadline, owner=luck.choice("abc")
        )
    except Overloaded:
        return "overloaded"
    if luck.random() < 0.3:
        luck.choice(streams).cancel()
    ends = {ended(stream, params) for stream in streams}
    return "+".join(sorted(ends))


def ended(stream: Stream, params: SamplingParams) -> str:
    try:
        tokens = read_all(stream)
    except DeadlineExceeded:
        return "late"
    if stream.finish_reason == "length":
        assert len(tokens) == params.max_tokens
    if params.logprobs is not None:
        assert len(stream.logprobs) == len(tokens)
    return str(stream.finish_reason)


def serve(engine: Engine, count: int, seed: int) -> set[str]:
    """`count` requests by several clients at once; every kind of end that occurred."""
    seen: set[str] = set()
    problems: list[BaseException] = []

    def client(number: int) -> None:
        luck = random.Random(seed + number)
        try:
            for _ in range(count // CLIENTS):
                seen.add(one_request(engine, luck))
        except BaseException as error:
            problems.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for one in clients:
        one.start()
    for one in clients:
        one.join()
    if problems:
        raise problems[0]
    return seen


def python_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def resident_bytes() -> int:
    """Of the process, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("paged", [False, True], ids=["slots", "pages"])
def test_ten_thousand_requests_leave_nothing_behind(paged: bool) -> None:
    threads = threading.active_count()
    model = model_of("llama")
    engine = engine_over(
        model,
        max_sequences=4,
        max_queue=8,
        step_tokens=64,
        paged=paged,
        kv_tokens=192 if paged else None,
    )
    tracemalloc.start()
    try:
        seen = serve(engine, WARM_UP, seed=0)
        before, resident = python_bytes(), resident_bytes()
        seen |= serve(engine, REQUESTS - WARM_UP, seed=100)
        grown, larger = python_bytes() - before, resident_bytes() - resident
    finally:
        tracemalloc.stop()
    stats = engine.stats()
    assert idle(engine)
    assert engine.alive
    engine.close()
    assert {"length", "cancelled", "late"} <= seen
    assert (stats.failed, stats.prefix_tokens > 0) == (0, True)
    if paged:
        assert stats.preemptions > 0
    sys.stdout.write(f"grown by {grown} bytes of Python objects, {larger / 2**20:.2f} MiB in all\n")
    assert grown < GROWTH_BYTES
    assert larger < RESIDENT_BYTES
    assert threading.active_count() == threads
