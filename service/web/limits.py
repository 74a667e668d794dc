"""What each API key may take: requests at once, and tokens per minute."""

import math
import threading
import time
from collections.abc import Callable
from collections.abc import Mapping

from service.config.api_keys import DEFAULT
from service.config.schema import KeyLimits
from service.errors import RateLimited

MINUTE_S = 60.0
NONE = KeyLimits()


class Accounts:
    """One account for each name of a key, made when it is first used. Any thread."""

    def __init__(
        self,
        limits: Callable[[], Mapping[str, KeyLimits]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """limits: those of now, by the name of a key: a reload may change them."""
        self._limits = limits
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._lock = threading.Lock()

    def of(self, name: str) -> "Account":
        """The account of this key; "" (a server without keys) has no limits."""
        now = self._limits()
        limits = now.get(name, now.get(DEFAULT, NONE)) if name else NONE
        with self._lock:
            if name not in self._accounts:
                self._accounts[name] = Account(limits, self._clock)
            account = self._accounts[name]
        account.limit(limits)
        return account


class Account:
    """Open requests and tokens of one key.

    Tokens flow in evenly, up to those of one minute. A request begins while there is at least one;
    its prompt is taken at once and its answer when it ends, so the balance may become negative,
    and the next request waits for longer: what is taken over time is never more than allowed.
    """

    def __init__(self, limits: KeyLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._open = 0
        self._balance = float(limits.tokens_per_minute or 0)
        self._at = clock()

    def limit(self, limits: KeyLimits) -> None:
        """From now on it may take this. Another token rate begins with those of a minute."""
        with self._lock:
            if limits.tokens_per_minute != self._limits.tokens_per_minute:
                self._balance, self._at = float(limits.tokens_per_minute or 0), self._clock()
            self._limits = limits

    def enter(self) -> None:
        """Count one more open request. Raises RateLimited."""
        most, rate = self._limits.concurrent, self._limits.tokens_per_minute
        with self._lock:
            if most is not None and self._open >= most:
                raise RateLimited(
                    f"this API key has {self._open} requests open and may have {most} at once"
                )
            self._flow()
            if rate is not None and self._balance < 1:
                wait_s = math.ceil((1 - self._balance) * MINUTE_S / rate)
                raise RateLimited(
                    f"this API key has used its {rate} tokens per minute; try again in {wait_s} s",
                    retry_after_s=wait_s,
                )
            self._open += 1

    def leave(self) -> None:
        """One request has ended."""
        with self._lock:
            self._open -= 1

    def take(self, tokens: int) -> None:
        """Tokens were used. Never refused: they have been computed, or will be."""
        with self._lock:
            self._flow()
            self._balance -= tokens

    def headers(self) -> dict[str, str]:
        """x-ratelimit-* as OpenAI names them; "requests" are requests at once. {} without limits.

        Reset is the time until all tokens are there again.
        """
        most, rate = self._limits.concurrent, self._limits.tokens_per_minute
        found: dict[str, str] = {}
        with self._lock:
            if most is not None:
                found["x-ratelimit-limit-requests"] = str(most)
                found["x-ratelimit-remaining-requests"] = str(max(0, most - self._open))
            if rate is not None:
                self._flow()
                full_s = (rate - self._balance) * MINUTE_S / rate
                found["x-ratelimit-limit-tokens"] = str(rate)
                found["x-ratelimit-remaining-tokens"] = str(max(0, int(self._balance)))
                found["x-ratelimit-reset-tokens"] = f"{full_s:.3f}s"
        return found

    def _flow(self) -> None:
        """Add what has flowed in since the last look. Lock held."""
        rate = self._limits.tokens_per_minute
        now = self._clock()
        if rate is not None:
            self._balance = min(float(rate), self._balance + (now - self._at) * rate / MINUTE_S)
        self._at = now
