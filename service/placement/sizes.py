"""Bytes as people read them."""

GIB = 2**30
MIB = 2**20


def in_words(size: int) -> str:
    """ "18.4 GiB", or "12.0 MiB" where a tenth of a GiB would say nothing."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= GIB / 10 else f"{size / MIB:.1f} MiB"
