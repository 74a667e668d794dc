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
from typing import TYPE_CHECKING

from service.engine.doing import Doing
from service.engine.doing import described
from service.engine.pace import Pace
from service.engine.pace import least_beside
from service.engine.params import SamplingParams
from service.engine.params import check_prompt
from service.engine.scheduler import Batch
from service.engine.scheduler import Piece
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.sequence import Stream
from service.engine.slots import Slots
from service.engine.stats import EngineStats
from service.errors import EngineStopped
from service.errors import NonFiniteLogits
from service.errors import OutOfMemory
from service.errors import PlacementDrifted
from service.errors import ServiceError
from service.errors import StepFailed

if TYPE_CHECKING:
    from service.engine.choosing import Chosen
    from service.engine.embedding import EmbeddingRunner
    from service.engine.runner import Result
    from service.engine.runner import Runner

log = logging.getLogger(__name__)

# Whether the model is still what was proven. Gets whether to look thoroughly; returns what to tell
# everybody if it is not.
Look = Callable[[bool], PlacementDrifted | None]

# After so many unexpected failures in a row the model itself is tried; if that fails, so has the
# engine, and the process can be replaced instead of failing every request for ever.
FAILURES_BEFORE_TRIAL = 3


class Engine:
    """Continues prompts. Public methods may be called from any thread; none runs the model."""

    def __init__(
        self,
        runner: "Runner | EmbeddingRunner",
        *,
        max_queue: int,
        on_death: Callable[[BaseException], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs before `start`. The runner says how many sequences run at once.

        max_queue: may wait beyond those. on_death: called once, on the engine thread, if that
        thread dies of an error or ends because the model changed, after the start; by then every
        stream has ended. clock: seconds, the clock of the deadlines.
        """
        self._runner = runner
        self._max_queue = max_queue
        self._on_death = on_death
        self._clock = clock
        self._ids = itertools.count()
        self._failures_in_a_row = 0  # engine thread only
        self._look: Look = lambda thorough: None
        self._doing = Doing()
        # Guards everything below, the scheduler and its memory. Never held while the model runs.
        self._changed = threading.Condition()
        nowhere = Slots(0, share=False)  # until the runner has found what its path needs
        self._scheduler = Scheduler(nowhere, max_sequences=1, max_queue=0, step_tokens=1)
        self._pace = Pace(least=1, most=1)
        self._thread: threading.Thread | None = None
        self._ready = False
        self._refusal: str | None = "The engine has not been started."
        self._closing = False
        self._death: BaseException | None = None
        self._steps = 0
        self._tokens = 0
        self._prompt_tokens = 0
        self._failed = 0
        self._look_wanted = False
        self._looks = 0

    @property
    def alive(self) -> bool:
        """Whether the engine thread is up and serving; stays True while draining."""
        return self._ready and self._death is None and not self._closing

    @property
    def path(self) -> str:
        """How batches are run: "ragged", "plain", "padded" or "alone". After `start`."""
        return self._runner.path.name

    def describe(self) -> dict[str, object]:
        """The `engine` object of GET /placement; see `doing.described`."""
        return described(self._runner.way, self.hangs())

    def hangs(self) -> str | None:
        """What the engine thread does not come back from, and for how long; None if all is well."""
        return self._doing.hangs(self._clock(), self._pace.step_s) if self.alive else None

    def start(self) -> None:
        """Start the thread and return when it has generated one token through the real path.

        Raises what `Runner.open` raised, EngineStopped if closed meanwhile, and RuntimeError if
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
        self,
        ids: Ids[int],
        params: SamplingParams,
        deadline: float | None = None,
        *,
        owner: str = "",
    ) -> Stream:
        """Queue a prompt and return the stream of its answer; see `submit_all`."""
        return self.submit_all([(ids, params)], deadline, owner=owner)[0]

    def submit_all(
        self,
        prompts: Ids[tuple[Ids[int], SamplingParams]],
        deadline: float | None = None,
        *,
        owner: str = "",
    ) -> list[Stream]:
        """Queue prompts, all or none, and return the streams of their answers.

        prompts: token ids, at least one each, and how to continue them. A prompt that occurs again
        is computed once (`n` answers to one question). deadline: on the engine's clock
        (`time.monotonic`), or None. owner: who asks; owners take turns when there is a queue.
        Raises InvalidRequest (empty prompt, id outside the vocabulary, a parameter out of range),
        ContextTooLong, Overloaded with `retry_after_s`, or EngineStopped if it takes no prompts.
        """
        sequences: list[Sequence] = []
        equal: dict[tuple[int, ...], list[Sequence]] = {}
        for ids, params in prompts:
            prompt = tuple(ids)
            check_prompt(
                prompt,
                params,
                vocabulary=self._runner.vocabulary,
                capacity=self._runner.capacity,
            )
            before = equal.setdefault(prompt, [])
            sequence = Sequence(
                next(self._ids),
                prompt,
                params,
                Stream(len(prompt)),
                deadline,
                owner,
                before[0] if before else None,
                number=len(before),
            )
            before.append(sequence)
            sequences.append(sequence)
        with self._changed:
            if self._refusal is not None:
                raise EngineStopped(self._refusal)
            self._scheduler.add(tuple(sequences), step_s=self._pace.step_s)
            self._changed.notify_all()
        return [sequence.stream for sequence in sequences]

    def allow_queue(self, max_queue: int) -> None:
        """From now on so many sequences may wait beyond those that run."""
        with self._changed:
            self._max_queue = max_queue
            self._scheduler.allow_queue(max_queue)

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
                kv_tokens=self._scheduler.memory.used_tokens,
                failed=self._failed,
                prompt_tokens=self._prompt_tokens,
                prefix_tokens=self._scheduler.memory.prefix_tokens,
                preemptions=self._scheduler.preemptions,
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

    def _end_all(self, error: ServiceError) -> None:
        """End all streams now; the engine thread frees their memory when it can. Lock held."""
        for sequence in self._scheduler.end_all(error):
            sequence.close_stream()

    # --- engine thread only

    def _live(self) -> None:
        try:
            self._runner.open()
            step_tokens = self._runner.path.step_tokens
            least = least_beside(self._runner.path)
            with self._changed:
                self._scheduler = Scheduler(
                    self._runner.path.memory,
                    max_sequences=self._runner.max_sequences,
                    max_queue=self._max_queue,
                    step_tokens=step_tokens,
                    score_tokens=self._runner.path.score_tokens,
                )
                self._pace = Pace(least=least, most=step_tokens)
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
        """Wait for work and do the next steps. Returns False when the engine is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._look_wanted or self._scheduler.has_work
            )
            look = self._look_wanted and not self._closing
        if look:
            self._inspect(thorough=False)
        batch: Batch | None = None
        with self._changed:
            if not self._closing:
                batch = self._scheduler.next_batch(self._clock(), self._pace.prefill_tokens)
        self._release_ended()
        if batch is not None:
            self._run(batch)
        self._doing.end()
        return not self._closing

    def _inspect(self, *, thorough: bool) -> None:
        """Take the look. Raises what it returns, which ends this thread."""
        drift: PlacementDrifted | None = None
        self._doing.begin("a look at the model", self._clock())
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

    def _run(self, batch: Batch) -> None:
        """Run a batch, and those that follow from it before its tokens are known.

        A device that computes one step while the next is being prepared never waits for this
        thread.
        """
        began = self._clock()
        self._doing.begin_step(len(batch.pieces), began)
        launched = self._runner.launch(batch)
        while True:
            following = self._following(batch) if launched.leads else None
            after = None if following is None else self._runner.launch(following)
            results = self._runner.collect(launched)
            ended = self._clock()
            self._judge(results)
            self._record(batch, results, took_s=ended - began)
            if following is None or after is None:
                return
            batch, launched, began = following, after, ended
            self._doing.begin_step(len(batch.pieces), began)

    def _following(self, batch: Batch) -> Batch | None:
        with self._changed:
            if self._closing or self._look_wanted:
                return None
            return self._scheduler.batch_after(batch, self._clock())

    def _judge(self, results: "list[tuple[Piece, Result]]") -> None:
        """After failures look at the model, and after several in a row try it."""
        errors = [result for _, result in results if isinstance(result, ServiceError)]
        if any(isinstance(error, (StepFailed, NonFiniteLogits)) for error in errors):
            self._inspect(thorough=True)
        if len(errors) < len(results):
            self._failures_in_a_row = 0
        elif any(isinstance(error, (StepFailed, OutOfMemory)) for error in errors):
            self._failures_in_a_row += 1
        if self._failures_in_a_row >= FAILURES_BEFORE_TRIAL:
            self._runner.try_out()  # raises if the model is broken, which ends this thread
            self._failures_in_a_row = 0

    def _record(
        self, batch: Batch, results: "list[tuple[Piece, Result]]", *, took_s: float
    ) -> None:
        """Note what a step gave, deliver its tokens, and end the sequences that are through."""
        deliver: list[tuple[Stream, Chosen]] = []
        with self._changed:
            self._steps += 1
            prompt_tokens = batch.tokens - len(batch.decodes)
            self._prompt_tokens += prompt_tokens
            self._pace.note(len(batch.decodes), prompt_tokens, took_s)
            for piece, result in results:
                if isinstance(result, ServiceError):
                    self._failed += piece.sequence.outcome is None
                    self._scheduler.end(piece.sequence, result)
                    continue
                token = None if result is None else result.token
                if self._scheduler.record(piece, token) and result is not None:
                    deliver.append((piece.sequence.stream, result))
                elif result is not None and piece.sequence.outcome == "stop":
                    piece.sequence.stream.ending = result
                self._tokens += token is not None
        for stream, chosen in deliver:
            stream.put(chosen.token, None if chosen.logprob is None else chosen)
        self._release_ended()

    def _release_ended(self) -> None:
        """Free the memory of ended sequences, then tell their clients."""
        while True:
            with self._changed:
                sequence = self._scheduler.take_ended()
                if sequence is None:
                    self._changed.notify_all()  # somebody may be draining
                    return
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
