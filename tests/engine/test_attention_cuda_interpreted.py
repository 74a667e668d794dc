"""The Triton kernels in Triton's interpreter on the CPU: the same cases as on a GPU, but slower."""

import importlib.util
import os
import sys
import warnings
from types import ModuleType

import pytest
import torch

from service.engine import attention_pages
from tests.support.paged import SHAPES
from tests.support.paged import Kept
from tests.support.paged import Shape
from tests.support.paged import error
from tests.support.paged import fresh_seed
from tests.support.paged import keep
from tests.support.paged import naive

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs the kernels compiled", allow_module_level=True)
if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
    pytest.skip("Triton is compiled already: run this file alone", allow_module_level=True)

LANGUAGE = os.environ.get("TRITON_INTERPRET")
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and the kernels are imported
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from service.engine import attention_cuda  # noqa: E402


@triton.jit
def loop(counts):
    for _ in range(tl.load(counts)):
        pass


try:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        loop[(1,)](torch.ones(1, dtype=torch.int32))
except InterpreterError as fault:  # Triton 3.6 with numpy 2.4
    pytest.skip(f"the interpreter cannot loop here: {fault}", allow_module_level=True)
if LANGUAGE is None:
    del os.environ["TRITON_INTERPRET"]

# older numpy only warns about what the interpreter does
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
LENGTHS = [1, 9, 40, 100]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton imports more of itself when first used
    return attention_cuda


def decoded(cuda: ModuleType, kept: Kept) -> torch.Tensor:
    return cuda.decode(
        kept.query, kept.key_pages, kept.value_pages, kept.tables, kept.counts,
        **kept.shape.options,
    )  # fmt: skip


@pytest.mark.parametrize("page", [8, 32, 48])
@pytest.mark.parametrize("name", SHAPES)
def test_decode_is_naive_attention_over_what_is_visible(cuda, name: str, page: int):
    shape = Shape(**{**SHAPES[name].__dict__, "page": page})
    kept = keep(shape, LENGTHS, seed=fresh_seed())
    assert error(decoded(cuda, kept), naive(kept)) < 1e-5


@pytest.mark.parametrize("size", [80, 96, 112, 192, 256])
def test_heads_that_are_no_power_of_two_are_padded(cuda, size: int):
    kept = keep(Shape(key=size, value=128, page=64), [70], seed=fresh_seed())
    assert error(decoded(cuda, kept), naive(kept)) < 1e-5


@pytest.mark.parametrize("splits", [(1, 64), (2, 64), (4, 128), (64, 64)])
@pytest.mark.parametrize("name", ["grouped", "ring"])
def test_any_number_of_splits_gives_the_same(cuda, name, splits, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda, "_splits", lambda *_: splits)
    kept = keep(SHAPES[name], [0, 1, 64, 65, 300], seed=fresh_seed())
    assert error(decoded(cuda, kept), naive(kept)) < 1e-5


def test_half_precision_stays_half_precision(cuda):
    kept = keep(Shape(), LENGTHS, seed=fresh_seed(), dtype=torch.float16)
    out = decoded(cuda, kept)
    assert out.dtype == torch.float16
    assert error(out, naive(kept)) < 1e-2


@pytest.mark.parametrize("name", ["grouped", "ring", "values shorter than keys"])
def test_one_kernel_writes_strided_keys_and_values(cuda, name: str):
    kept = keep(SHAPES[name], [40, 12, 9], [40, 1, 3], seed=fresh_seed())
    key_pages, value_pages = kept.key_pages.clone(), kept.value_pages.clone()
    for pages in (key_pages, value_pages):
        pages[kept.slots // kept.shape.page, kept.slots % kept.shape.page] = -1.0
    assert not kept.new_key.is_contiguous()
    cuda.write(kept.new_key, kept.new_value, key_pages, value_pages, kept.slots)
    assert torch.equal(key_pages.nan_to_num(7.0), kept.key_pages.nan_to_num(7.0))
    assert torch.equal(value_pages.nan_to_num(7.0), kept.value_pages.nan_to_num(7.0))


def flash_in_float32(query, key, value, part, scale, window):
    """Stands in for the flash operation: takes what it would be given, in plain torch."""
    assert key.shape == value.shape
    assert int(part.cu_k[-1]) == len(key) == len(part.slots)
    pages = key[None], value[None]  # one page that holds everything
    outs = []
    for i in range(len(part.cu_q) - 1):
        low, high = int(part.cu_k[i]), int(part.cu_k[i + 1])
        begin, end = int(part.cu_q[i]), int(part.cu_q[i + 1])
        assert end - begin <= part.max_q
        assert high - low <= part.max_k
        outs.append(
            attention_pages.prefill(
                query[begin:end], *(p[:, low:high] for p in pages), torch.zeros(1, 1).int(),
                [0, end - begin], [high - low], scale=scale, window=window, softcap=None,
            )
        )  # fmt: skip
    return torch.cat(outs)


@pytest.mark.parametrize("gathered", [2**16, 1, 50])
@pytest.mark.parametrize("name", ["grouped", "window", "ring", "values shorter than keys"])
def test_prefill_gathers_what_its_queries_see(
    cuda, name: str, gathered: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cuda, "_flashes", lambda *_: True)
    monkeypatch.setattr(cuda, "_flash", lambda: flash_in_float32)
    monkeypatch.setattr(cuda, "GATHERED_TOKENS", gathered)
    kept = keep(SHAPES[name], [40, 12, 9, 100], [40, 1, 3, 20], seed=fresh_seed())
    page = (kept.tables, kept.starts, kept.lengths)
    plan = cuda.plan_prefill(*page, page_size=kept.shape.page, window=kept.shape.window)
    assert len(plan.parts) == {2**16: 1, 1: 4, 50: 3 if kept.shape.window is None else 2}[gathered]
    for given in (plan, None):
        out = cuda.prefill(
            kept.query, kept.key_pages, kept.value_pages, *page, **kept.shape.options, plan=given
        )
        assert error(out, naive(kept)) < 1e-5


@pytest.mark.parametrize("name", ["soft cap", "odd head", "values longer than keys"])
def test_what_flash_attention_does_not_take_goes_to_the_reference(cuda, name: str):
    kept = keep(SHAPES[name], [40, 12], [40, 1], seed=fresh_seed())
    out = cuda.prefill(
        kept.query, kept.key_pages, kept.value_pages, kept.tables, kept.starts, kept.lengths,
        **kept.shape.options,
    )  # fmt: skip
    assert error(out, naive(kept)) < 1e-5


@pytest.mark.parametrize("window", [None, 5])
def test_the_public_flash_attention_accepts_what_it_is_given(cuda, window: int | None):
    # on tensors without data: its signature and checks, not its arithmetic
    if cuda._flash() is not cuda._flash_public:
        pytest.skip("this PyTorch's varlen_attn takes no grouped heads")
    query = torch.empty(9, 4, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(20, 2, 64, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(3, dtype=torch.int32, device="meta")
    part = cuda.PrefillPart(0, 9, ends, ends, ends, 6, 12)
    assert cuda._flash_public(query, key, key, part, 0.1, window).shape == query.shape


def test_splits_come_from_shapes_and_fill_the_device(cuda):
    few, short = cuda._splits(8, 4096, 64, 132)
    assert (few, short) == (64, 64)
    assert cuda._splits(8, 200, 64, 132) == (4, 64), "never more splits than blocks"
    many, long = cuda._splits(2048, 4096, 64, 132)
    assert (many, long) == (1, 1024), "a full device needs no split"
    assert cuda._splits(2048, 131072, 64, 132) == (8, 1024), "but one long sequence does"


@pytest.mark.parametrize("shared", [64 * 1024, 99 * 1024, 227 * 1024])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_into_shared_memory(cuda, shared: int, size: int, itemsize: int):
    query_bytes = 16 * size * itemsize
    block, stages = cuda._blocks(2 * size * itemsize, query_bytes, shared)
    assert stages * block * 2 * size * itemsize + query_bytes <= shared
