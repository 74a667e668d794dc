"""What an engine has done and is doing, as numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts at one moment.

    running, waiting: sequences. steps, tokens: batches run and tokens chosen since the start.
    prompt_tokens: of prompts, computed since the start; prefix_tokens: found computed instead.
    kv_tokens: room for tokens that sequences hold in KV caches. failed: sequences that ended
    because their step failed. preemptions: sequences that gave way for want of memory.
    """

    running: int
    waiting: int
    steps: int
    tokens: int
    kv_tokens: int
    failed: int
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
