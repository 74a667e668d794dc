"""The compiled kernels and PyTorch's flash attention on a GPU, against naive attention.

Needs no models: with `--noconftest` it runs where only torch, Triton and pytest are installed.
"""

from collections.abc import Callable
from collections.abc import Iterator

import pytest
import torch

from tests.support.paged import NO_PAGE
from tests.support.paged import SHAPES
from tests.support.paged import Kept
from tests.support.paged import Shape
from tests.support.paged import error
from tests.support.paged import fresh_seed
from tests.support.paged import keep
from tests.support.paged import naive

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from service.engine import attention_cuda as cuda  # noqa: E402

LENGTHS = [1, 63, 64, 65, 200, 777, 130]
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
REAL = {
    "64": Shape(heads=32, kv_heads=8, key=64, value=64),
    "80": Shape(heads=32, kv_heads=32, key=80, value=80),
    "96": Shape(heads=32, kv_heads=32, key=96, value=96),
    "112": Shape(heads=16, kv_heads=8, key=112, value=112),
    "128": Shape(heads=32, kv_heads=8, key=128, value=128),
    "192 and 128": Shape(heads=16, kv_heads=16, key=192, value=128),
    "256 in a ring": Shape(heads=8, kv_heads=4, key=256, value=256, window=128, ring=True),
    "256 capped": Shape(heads=16, kv_heads=8, key=256, value=256, softcap=50.0),
}
CASES = {**SHAPES, **REAL}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN; a wait of the host for the device is an error."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def unwaiting(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def case(name: str, lengths: list[int], new: list[int] | None, page: int, dtype: torch.dtype):
    shape = Shape(**{**CASES[name].__dict__, "page": page})
    return keep(shape, lengths, new, seed=fresh_seed(), dtype=dtype, device="cuda")


def decoded(kept: Kept) -> torch.Tensor:
    counts = kept.counts
    return unwaiting(
        lambda: cuda.decode(
            kept.query, kept.key_pages, kept.value_pages, kept.tables, counts,
            **kept.shape.options,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("page", "dtype"), [(64, torch.bfloat16), (64, torch.float32), (48, torch.bfloat16)]
)
@pytest.mark.parametrize("name", CASES)
def test_decode_is_naive_attention_over_what_is_visible(name: str, page: int, dtype: torch.dtype):
    kept = case(name, LENGTHS, None, page, dtype)
    assert error(decoded(kept), naive(kept)) < BOUNDS[dtype]


@pytest.mark.parametrize("splits", [(1, 64), (2, 128), (64, 64)])
def test_any_number_of_splits_gives_the_same(splits, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_splits", lambda *_: splits)
    kept = case("128", [0, 1, 64, 65, 2000, 5000], None, 64, torch.float32)
    assert error(decoded(kept), naive(kept)) < 1e-5


def test_a_batch_that_fills_the_device_holds_one_long_sequence():
    kept = case("128", [20000, *[100] * 80], None, 64, torch.bfloat16)
    assert error(decoded(kept), naive(kept)) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", REAL)
def test_one_kernel_writes_strided_keys_and_values(name: str, dtype: torch.dtype):
    kept = case(name, [400, 12, 90, 1], [40, 1, 3, 1], 64, dtype)
    key_pages, value_pages = kept.key_pages.clone(), kept.value_pages.clone()
    for pages in (key_pages, value_pages):
        pages[kept.slots // 64, kept.slots % 64] = -1.0
    key, value = kept.new_key, kept.new_value
    cuda.write(key, value, key_pages, value_pages, kept.slots)
    assert torch.equal(key_pages.nan_to_num(7.0), kept.key_pages.nan_to_num(7.0))
    assert torch.equal(value_pages.nan_to_num(7.0), kept.value_pages.nan_to_num(7.0))


@pytest.mark.parametrize("gathered", [2**16, 500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_prefill_is_naive_attention_of_every_new_token(
    name: str, dtype: torch.dtype, gathered: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda, "GATHERED_TOKENS", gathered)
    kept = case(name, [300, 64, 9, 500], [300, 1, 3, 77], 64, dtype)
    taken = kept.shape.softcap is None and cuda._flashes(
        kept.query, kept.shape.key, kept.shape.value
    )
    assert taken == (name not in {"odd head", "values longer than keys"} and "cap" not in name)
    torch.use_deterministic_algorithms(taken)  # cuBLAS, in the reference, would refuse
    place = (kept.tables, kept.starts, kept.lengths)

    def run() -> torch.Tensor:
        plan = cuda.plan_prefill(*place, page_size=64, window=kept.shape.window)
        return cuda.prefill(
            kept.query, kept.key_pages, kept.value_pages, *place, **kept.shape.options, plan=plan
        )

    assert error(unwaiting(run), naive(kept)) < BOUNDS[dtype]


@pytest.mark.parametrize("name", ["grouped", "ring", "soft cap", "192 and 128"])
def test_prefill_in_float32_is_the_reference(name: str):
    torch.use_deterministic_algorithms(False)
    kept = case(name, [300, 64], [300, 1], 64, torch.float32)
    place = (kept.tables, kept.starts, kept.lengths)
    out = unwaiting(
        lambda: cuda.prefill(
            kept.query, kept.key_pages, kept.value_pages, *place, **kept.shape.options
        )
    )
    assert error(out, naive(kept)) < 1e-5


@pytest.mark.parametrize("name", ["128", "ring", "192 and 128"])
def test_a_captured_graph_follows_new_tokens_lengths_and_tables(name: str):
    first = case(name, [70, 300, 0, 0], None, 64, torch.bfloat16)
    later = case(name, [600, 1, 130, 200], None, 64, torch.bfloat16)
    scratch = 40  # a page that no sequence owns
    shape = first.shape
    pages = [torch.full((41, 64, shape.kv_heads, size), torch.nan, dtype=torch.bfloat16,
                        device="cuda") for size in (shape.key, shape.value)]  # fmt: skip
    tables = torch.zeros((4, 16), dtype=torch.int32, device="cuda")
    counts = torch.zeros(4, dtype=torch.int32, device="cuda")
    slots = torch.zeros(4, dtype=torch.int64, device="cuda")
    query = torch.zeros((4, shape.heads, shape.key), dtype=torch.bfloat16, device="cuda")
    key = torch.zeros((1, shape.kv_heads, 4, shape.key), dtype=torch.bfloat16, device="cuda")
    value = torch.zeros((1, shape.kv_heads, 4, shape.value), dtype=torch.bfloat16, device="cuda")

    def fill(kept: Kept) -> torch.Tensor:
        """Put `kept` into the graph's tensors, without this step's tokens, which it writes."""
        live = [row for row, length in enumerate(kept.lengths) if length]
        for pool, source in zip(pages, (kept.key_pages, kept.value_pages), strict=True):
            pool.fill_(torch.nan)
            pool[: len(source)] = source
            pool[kept.slots // 64, kept.slots % 64] = -1.0
        tables.fill_(scratch)
        tables[:, : kept.tables.shape[1]] = kept.tables.clamp_max(scratch)
        counts.copy_(kept.counts)
        slots.fill_(scratch * 64)
        slots[live] = kept.slots
        query.copy_(kept.query)
        for row, mine in ((key, kept.key), (value, kept.value)):
            row.zero_()
            for at in live:
                row[0, :, at] = mine[at][-1]
        return naive(kept)

    def step() -> torch.Tensor:
        cuda.write(key[0].transpose(0, 1), value[0].transpose(0, 1), *pages, slots)
        return cuda.decode(query, *pages, tables, counts, **shape.options)

    right = fill(first)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for kept in (first, later, first):
        right = fill(kept)
        out.fill_(torch.nan)
        graph.replay()
        assert error(out, right) < 1e-2
    counts[2:] = 1  # unused rows may also look at the scratch page, where one token was written
    graph.replay()
    assert error(out[:2], right[:2]) < 1e-2


def test_print_what_a_decode_step_takes():
    """Microseconds of write and decode for one layer of the 8B shape, beside the floor."""
    torch.use_deterministic_algorithms(False)
    bandwidth = copied_bytes_per_s()
    print(f"\ncopy: {bandwidth / 1e12:.2f} TB/s; 32/8 heads of 128, bf16, pages of 64")
    print("  n  tokens  context  write+decode us  floor us  share")
    layers = 32
    for n, tokens, context in (
        (1, 256, 512), (8, 256, 512), (64, 256, 512), (256, 256, 512),
        (1, 256, 131072), (8, 256, 131072), (64, 256, 131072), (256, 256, 131072),
        (1, 8192, 8192), (8, 8192, 8192), (1, 131072, 131072), (64, 2048, 8192),
    ):  # fmt: skip
        took = decode_us(n, tokens, context, layers)
        floor = n * tokens * 8 * 256 * 2 / bandwidth * 1e6
        print(f"{n:3} {tokens:7} {context:8} {took:16.1f} {floor:9.1f} {floor / took:6.0%}")


def copied_bytes_per_s() -> float:
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (replayed_ms(lambda: torch.neg(source, out=target), 5) / 1e3)


def decode_us(n: int, tokens: int, context: int, layers: int = 32) -> float:
    """Of one layer, from a graph over many, each with pages of its own: no cache serves it."""
    used = n * -(-tokens // 64)
    layers = max(2, min(layers, 2**34 // (used * 64 * 4096)))
    pools = [
        [torch.randn(used + 1, 64, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        for _ in range(layers)
    ]
    tables = torch.full((n, context // 64), NO_PAGE, dtype=torch.int32, device="cuda")
    order = torch.randperm(used, dtype=torch.int32, device="cuda")
    tables[:, : used // n] = order.view(n, -1)
    lengths = torch.full((n,), tokens, dtype=torch.int32, device="cuda")
    slots = tables[:, used // n - 1].long() * 64 + 63
    query, key, value = (
        torch.randn(1, heads, n, 128, dtype=torch.bfloat16, device="cuda")[0].transpose(0, 1)
        for heads in (32, 8, 8)
    )

    def step() -> None:
        for pages in pools:
            cuda.write(key, value, *pages, slots)
            cuda.decode(query, *pages, tables, lengths, scale=0.1, window=None, softcap=None)

    return replayed_ms(step, 20) / layers * 1e3


def replayed_ms(step: Callable[[], object], times: int) -> float:
    """The median of `times` replays of a graph of `step`."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    taken = []
    for _ in range(times + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return sorted(taken[2:])[times // 2]
