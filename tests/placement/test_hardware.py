"""Machines as data: this one and those in words."""

import os
from pathlib import Path

import pytest

from service.placement import hardware
from service.placement.hardware import invent
from tests.support.planned import GIB
from tests.support.planned import MIB


@pytest.mark.parametrize(
    ("text", "totals"),
    [
        ("2x24GiB", [24, 24]),
        ("24GiB", [24]),
        ("24GiB,80GiB", [24, 80]),
        ("2x24GiB, 1x80 GiB", [24, 24, 80]),
        ("ram=16GiB", []),
    ],
)
def test_cards_are_counted_in_order(text: str, totals: list[int]):
    found = invent(text)
    assert [gpu.total_bytes for gpu in found.gpus] == [size * GIB for size in totals]
    assert [gpu.id for gpu in found.gpus] == [f"cuda:{i}" for i in range(len(totals))]


def test_a_cards_driver_takes_half_a_gib():
    assert invent("24GiB").gpus[0].free_bytes == 24 * GIB - 512 * MIB
    assert invent("256MiB").gpus[0].free_bytes == 0


def test_ram_and_disk_are_what_is_said_or_plenty():
    said = invent("24GiB,ram=16GiB,disk=100GB")
    assert (said.cpu.total_bytes, said.cpu.free_bytes) == (16 * GIB, 16 * GIB)
    assert said.disk_free_bytes == 100 * 10**9
    plain = invent("24GiB")
    assert (plain.cpu.total_bytes, plain.disk_free_bytes) == (64 * GIB, 1024 * GIB)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("two cards", "'two cards'"),
        ("2x", "'2x'"),
        ("2x24", "'24'"),
        ("0x24GiB", "'0x24GiB'"),
        ("24GiB,", "''"),
        ("24GiB,swap=1GiB", "'swap=1GiB'"),
        ("ram=", "''"),
        ("ram=0GiB", "'0GiB'"),
        ("ram=-1GiB", "'-1GiB'"),
        ("24gigs", "'24gigs'"),
    ],
)
def test_words_that_are_no_machine_are_named(text: str, named: str):
    with pytest.raises(ValueError, match=r"cannot read|is not a size") as caught:
        invent(text)
    assert named in str(caught.value)


def test_this_machine_has_memory_and_cores(tmp_path: Path):
    import torch

    found = hardware.detect(tmp_path / "not" / "yet" / "there")
    assert 0 < found.cpu.free_bytes <= found.cpu.total_bytes
    assert 1 <= found.cpu.cores <= (os.cpu_count() or 1)
    assert found.disk_free_bytes > 0
    assert len(found.gpus) == torch.cuda.device_count()
    for gpu in found.gpus:
        assert 0 < gpu.free_bytes <= gpu.total_bytes


def test_a_containers_limit_counts_rather_than_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hardware, "_cgroup_memory", lambda: (300 * MIB, 100 * MIB))
    found = hardware.detect(tmp_path)
    assert found.cpu.total_bytes == 300 * MIB
    assert found.cpu.free_bytes == 200 * MIB


@pytest.mark.parametrize(
    ("content", "found"),
    [("1073741824\n", (GIB, 90)), ("max\n", (2**63, 0)), (f"{2**63 - 4096}\n", (2**63, 0))],
)
def test_a_containers_limit_is_read_and_its_page_cache_is_not_counted_as_used(
    tmp_path: Path, content: str, found: tuple[int, int]
):
    (tmp_path / "memory.max").write_text(content)
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 80\ninactive_file 10\n")
    assert hardware._cgroup_memory(tmp_path) == found
