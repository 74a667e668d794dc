"""The torch reference against naive attention, with poison wherever nothing may be read."""

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

LENGTHS = [1, 7, 8, 9, 40, 100, 33]
DECODES = [
    attention_pages.decode,
    attention_pages.decode_each,
    attention_pages.decode_gathered,
]


def prefill(kept: Kept) -> torch.Tensor:
    return attention_pages.prefill(
        kept.query, kept.key_pages, kept.value_pages, kept.tables, kept.starts, kept.lengths,
        **kept.shape.options,
    )  # fmt: skip


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("name", SHAPES)
def test_decode_is_naive_attention_over_what_is_visible(decode, name: str):
    kept = keep(SHAPES[name], LENGTHS, seed=fresh_seed())
    out = decode(
        kept.query, kept.key_pages, kept.value_pages, kept.tables, kept.counts,
        **kept.shape.options,
    )  # fmt: skip
    assert error(out, naive(kept)) < 1e-5


@pytest.mark.parametrize("decode", DECODES)
def test_an_empty_row_gives_zeros_and_disturbs_nobody(decode):
    kept = keep(Shape(), [0, 12, 0, 5], seed=fresh_seed())
    out = decode(
        kept.query, kept.key_pages, kept.value_pages, kept.tables, kept.counts,
        **kept.shape.options,
    )  # fmt: skip
    assert not out[0].any()
    assert not out[2].any()
    assert error(out, naive(kept)) < 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_prefill_is_naive_attention_of_every_new_token(name: str):
    kept = keep(SHAPES[name], LENGTHS, [1, 7, 1, 5, 40, 13, 20], seed=fresh_seed())
    assert error(prefill(kept), naive(kept)) < 1e-5


@pytest.mark.parametrize("name", ["grouped", "ring", "soft cap", "soft cap in a ring"])
def test_a_long_piece_is_attended_in_parts(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_pages, "QUERY_ROWS", 7)
    monkeypatch.setattr(attention_pages, "SCORES", 1000)
    kept = keep(SHAPES[name], [60, 95], [50, 31], seed=fresh_seed())
    assert error(prefill(kept), naive(kept)) < 1e-5


def test_a_sequence_in_one_page_is_read_without_a_copy(monkeypatch: pytest.MonkeyPatch):
    # the CPU's slots: one page as long as the context
    read = []
    attend = attention_pages._attend
    monkeypatch.setattr(
        attention_pages,
        "_attend",
        lambda q, k, v, *a, **o: read.append(k) or attend(q, k, v, *a, **o),
    )
    kept = keep(Shape(page=64), [50], seed=fresh_seed())
    out = attention_pages.decode(
        kept.query, kept.key_pages, kept.value_pages, kept.tables, kept.counts,
        **kept.shape.options,
    )  # fmt: skip
    assert error(out, naive(kept)) < 1e-5
    assert read[0].untyped_storage().data_ptr() == kept.key_pages.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["grouped", "ring", "values shorter than keys"])
def test_written_tokens_lie_in_their_slots_and_nowhere_else(name: str):
    kept = keep(SHAPES[name], LENGTHS, [1, 7, 1, 5, 40, 13, 20], seed=fresh_seed())
    key_pages, value_pages = kept.key_pages.clone(), kept.value_pages.clone()
    page = kept.shape.page
    for pages in (key_pages, value_pages):
        pages[kept.slots // page, kept.slots % page] = -1.0
    assert not kept.new_key.is_contiguous()
    attention_pages.write(kept.new_key, kept.new_value, key_pages, value_pages, kept.slots)
    assert torch.equal(key_pages.nan_to_num(7.0), kept.key_pages.nan_to_num(7.0))
    assert torch.equal(value_pages.nan_to_num(7.0), kept.value_pages.nan_to_num(7.0))


def test_half_precision_stays_half_precision():
    kept = keep(Shape(softcap=5.0), [40, 9], [40, 3], seed=fresh_seed(), dtype=torch.bfloat16)
    out = prefill(kept)
    assert out.dtype == torch.bfloat16
    assert error(out, naive(kept)) < 1e-2
