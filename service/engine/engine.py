"""The one thread that runs the model: schedule, run, deliver.

What crosses `submit` and `Stream` is native types only, so that an engine in another process could
stand behind the same seam. HTTP knows nothing below it.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.engine.scheduler import Scheduler
from service.engine.scheduler import Work
from service.engine.sequence import SamplingParams
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.errors import ContextTooLong
from service.errors import EngineStopped
from service.errors import InvalidRequest
from service.errors import NonFiniteLogits
from service.errors import PlacementDrifted
from service.errors import RequestError
from service.errors import ServiceError
from service.errors import StepFailed

if TYPE_CHECKING:
    from service.engine.runner import Runner
    from service.engine.sampling import Sampler

log = logging.getLogger(__name__)

# Whether the model is still what was proven. Gets whether to look thoroughly; returns what to tell
# everybody if it is not.
Look = Callable[[bool], PlacementDrifted | None]

# After so many unexpected failures in a row the model itself is tried; if that fails, so has the
# engine, and the process can be replaced instead of failing every request for ever.
FAILURES_BEFORE_TRIAL = 3


@dataclass(frozen=True)
class EngineStats:
    """Counts at one moment.

    running, waiting: sequences. steps, tokens: forwards run and tokens chosen since the start.
    kv_tokens: tokens held in KV caches. failed: sequences that ended because their step failed.
    """

    running: int
    waiting: int
    steps: int
    tokens: int
    kv_tokens: int
    failed: int


class Engine:
    """Continues prompts. Public methods may be called from any thread; none runs the model."""

    def __init__(
        self,
        runner: "Runner",
        *,
        max_sequences: int,
        max_queue: int,
        chunk_tokens: int = 512,
        on_death: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs before `start`.

        max_sequences: run at once. max_queue: may wait beyond those. chunk_tokens: of a prompt, in
        one step; a cancel or a deadline is seen between chunks. on_death: called once, on the
        engine thread, if that thread dies of an error or ends because the model changed, after the
        start; by then every stream has ended. clock: seconds, the clock of the deadlines.
        """
        self._runner = runner
        self._scheduler = Scheduler(
            max_sequences=max_sequences, max_queue=max_queue, chunk_tokens=chunk_tokens
        )
        self._on_death = on_death
        self._clock = clock
        self._ids = itertools.count()
        self._failures_in_a_row = 0  # engine thread only
        self._look: Look = lambda thorough: None
        # Guards everything below and the scheduler. Never held while the model runs.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ready = False
        self._refusal: str | None = "The engine has not been started."
        self._closing = False
        self._death: BaseException | None = None
        self._steps = 0
        self._tokens = 0
        self._failed = 0
        self._step_s = 0.0
        self._look_wanted = False
        self._looks = 0

    @property
    def alive(self) -> bool:
        """Whether the engine thread is up and serving; stays True while draining."""
        return self._ready and self._death is None and not self._closing

    def start(self) -> None:
        """Start the thread and return when it has generated one token through the real path.

        Raises what `Runner.warm_up` raised, EngineStopped if closed meanwhile, and RuntimeError if
        it was started or closed before.
        """
        with self._changed:
            if self._thread is not None or self._closing:
                raise RuntimeError("an engine is started once, and not after its end")
            self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
            self._thread.start()
            self._changed.wait_for(lambda: self._ready or self._death or self._closing)
            if self._death is not None:
                raise self._death
            if self._closing:
                raise EngineStopped("The engine was closed while it started.")

    def submit(
        self, ids: Ids[int], params: SamplingParams, deadline: float | None = None
    ) -> Stream:
        """Queue a prompt and return the stream of its answer.

        ids: token ids, at least one. deadline: on the engine's clock (`time.monotonic`), or None.
        Raises InvalidRequest (empty prompt, id outside the vocabulary, max_tokens below 1),
        ContextTooLong, Overloaded with `retry_after_s`, or EngineStopped if it takes no prompts.
        """
        prompt = tuple(ids)
        self._check(prompt, params)
        stream = Stream(len(prompt))
        with self._changed:
            if self._refusal is not None:
                raise EngineStopped(self._refusal)
            sequence = Sequence(next(self._ids), prompt, params, stream, deadline)
            self._scheduler.add(sequence, step_s=self._step_s)
            self._changed.notify_all()
        return stream

    def look_with(self, look: Look) -> None:
        """Have `look` called on the engine thread, between steps, where nothing moves.

        Whenever `inspect` asks for it, and, thoroughly, after a step that raised unexpectedly or
        gave no numbers. What it returns ends the engine: every stream ends with it, then `on_death`
        gets it. What it raises is logged. Call it after `start` and before the first prompt.
        """
        self._look = look

    def inspect(self, timeout_s: float) -> bool:
        """Ask for a look before the next step; at once if nothing runs.

        Returns whether one was taken within `timeout_s`; with 0 it does not wait.
        """
        with self._changed:
            before = self._looks
            self._look_wanted = True
            self._changed.notify_all()
            if timeout_s > 0:
                self._changed.wait_for(lambda: self._looks > before or not self.alive, timeout_s)
            return self._looks > before

    def stats(self) -> EngineStats:
        """Counts, all taken at the same moment."""
        with self._changed:
            return EngineStats(
                running=self._scheduler.running,
                waiting=self._scheduler.waiting,
                steps=self._steps,
                tokens=self._tokens,
                kv_tokens=self._runner.kv_tokens,
                failed=self._failed,
            )

    def drain(self, timeout_s: float) -> bool:
        """Take no more prompts, let the accepted finish within `timeout_s`, then end the rest.

        The rest end with EngineStopped. Returns whether all finished. Blocks, but never beyond
        `timeout_s`, even if a step hangs. Call `close` afterwards.
        """
        with self._changed:
            if self._refusal is None:
                self._refusal = "The server is shutting down."
            finished = self._changed.wait_for(
                lambda: not self._scheduler.has_work or not self.alive, timeout_s
            )
            if not finished:
                self._end_all(EngineStopped("The server is shutting down."))
            return finished and self._death is None

    def close(self, timeout_s: float = 10.0) -> None:
        """End every stream with EngineStopped, and the thread after its step. May be repeated.

        Waits at most `timeout_s` for the step; the thread is a daemon, so a step that hangs does
        not keep the process.
        """
        with self._changed:
            self._closing = True
            self._refusal = "The engine is closed."
            self._end_all(EngineStopped("The server is shutting down."))
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)
            if thread.is_alive():
                log.error("the engine thread is still in a step after %s s", timeout_s)

    # --- any thread

    def _check(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        if not prompt:
            raise InvalidRequest("The prompt is empty; give at least one token.", param="prompt")
        if params.max_tokens < 1:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens}; give 1 or more.", param="max_tokens"
            )
        capacity = self._runner.capacity
        total = len(prompt) + params.max_tokens
        if total > capacity:
            raise ContextTooLong(
                f"This model's maximum context length is {capacity} tokens. However, you requested "
                f"{total} tokens ({len(prompt)} in the prompt, {params.max_tokens} in the "
                "completion). Please reduce the length of the prompt or completion."
            )
        vocabulary = self._runner.vocabulary
        for position, token in enumerate(prompt):
            if type(token) is not int or not 0 <= token < vocabulary:
                raise InvalidRequest(
                    f"Token {token!r} at position {position} of the prompt is not one of this "
                    f"model's ids, which are whole numbers from 0 to {vocabulary - 1}.",
                    param="prompt",
                )

    def _end_all(self, error: ServiceError) -> None:
        """End all streams now; the engine thread frees their memory when it can. Lock held."""
        for sequence in self._scheduler.end_all(error):
            sequence.close_stream()

    # --- engine thread only

    def _live(self) -> None:
        try:
            self._runner.warm_up()
            with self._changed:
                self._ready = True
                if not self._closing:
                    self._refusal = None
                self._changed.notify_all()
            while self._turn():
                pass
        except BaseException as error:  # whatever ends this thread: no client may wait for ever
            self._die(error)
        finally:
            self._runner.release()

    def _turn(self) -> bool:
        """Wait for work and do one step of it. Returns False when the engine is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._look_wanted or self._scheduler.has_work
            )
            look = self._look_wanted and not self._closing
        if look:
            self._inspect(thorough=False)
        with self._changed:
            work = None if self._closing else self._scheduler.next_work(self._clock())
        self._release_ended()
        if work is not None:
            self._step(work)
        return not self._closing

    def _inspect(self, *, thorough: bool) -> None:
        """Take the look. Raises what it returns, which ends this thread."""
        drift: PlacementDrifted | None = None
        with self._changed:
            self._look_wanted = False  # before the look: who asks during it wants another
        try:
            drift = self._look(thorough)
        except Exception:  # reading a lost device raises anything; the trial of the model decides
            log.exception("the model could not be looked at")
        with self._changed:
            self._looks += 1
            self._changed.notify_all()
        if drift is not None:
            raise drift

    def _step(self, work: Work) -> None:
        """Run one step, deliver its token, and end the sequence if this was its last."""
        token: int | None = None
        error: ServiceError | None = None
        began = self._clock()
        try:
            logits = self._runner.step(work.sequence.id, work.ids, work.start)
            if work.samples:
                token = _sampler(work.sequence).choose(logits)
            self._failures_in_a_row = 0
        except RequestError as known:
            error = known
        except Exception:  # model and strategy may raise anything: it fails this sequence only
            log.exception("a step of sequence %d failed", work.sequence.id)
            error = StepFailed("The model failed on this request. The server's log says why.")
            self._failures_in_a_row += 1
        if isinstance(error, (StepFailed, NonFiniteLogits)):
            self._inspect(thorough=True)
        self._record(work, token, error, took_s=self._clock() - began)
        if self._failures_in_a_row >= FAILURES_BEFORE_TRIAL:
            self._runner.warm_up()  # raises if the model is broken, which ends this thread
            self._failures_in_a_row = 0

    def _record(
        self, work: Work, token: int | None, error: ServiceError | None, *, took_s: float
    ) -> None:
        deliver = False
        with self._changed:
            self._steps += 1
            # A running mean over about ten steps, for Retry-After.
            self._step_s += (took_s - self._step_s) * (0.1 if self._step_s else 1.0)
            if error is not None:
                self._failed += 1
                self._scheduler.end(work.sequence, error)
            else:
                self._tokens += token is not None
                deliver = self._scheduler.record(work, token)
        if deliver and token is not None:
            work.sequence.stream.put(token)
        self._release_ended()

    def _release_ended(self) -> None:
        """Free the memory of ended sequences, then tell their clients."""
        while True:
            with self._changed:
                sequence = self._scheduler.take_ended()
                if sequence is None:
                    self._changed.notify_all()  # somebody may be draining
                    return
            try:
                self._runner.free(sequence.id)
            finally:
                sequence.close_stream()

    def _die(self, error: BaseException) -> None:
        with self._changed:
            served = self._ready
            self._death = error
            told: ServiceError = EngineStopped("The engine has stopped after an error.")
            if isinstance(error, PlacementDrifted):
                told = error
            self._refusal = told.message
            self._end_all(told)
            self._changed.notify_all()
        if not served:
            return  # `start` raises it
        if told is not error:
            log.critical("the engine thread died", exc_info=error)
        if self._on_death is not None:
            self._on_death(error)


def _sampler(sequence: Sequence) -> "Sampler":
    """The sequence's sampler, made at its first token. Late import: no torch in this module."""
    if sequence.sampler is None:
        from service.engine.sampling import Sampler

        sequence.sampler = Sampler(sequence.params)
    return sequence.sampler
