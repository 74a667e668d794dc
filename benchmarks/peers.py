"""Engines that answer requests in this process, each behind the same two methods.

One of them lives in a process of its own (`benchmarks.worker`), with whatever interpreter has it
installed, so nothing is imported before `make`.
"""

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from typing import Protocol

from benchmarks.loops import beside
from benchmarks.workload import Request
from service.cli.timing import Answer
from service.cli.timing import closed_loop

# seconds until an engine that says nothing is given up
SILENCE_S = 900.0


class Absent(Exception):
    """A peer that cannot run here: not installed, or its model is not there."""


class Peer(Protocol):
    """An engine that is ready. detail: versions and the settings that matter."""

    detail: dict[str, Any]

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        """Answer all, `streams` at a time, the next when one is done. Greedy, no early end."""

    def one(self, request: Request, answer: Answer) -> None:
        """See `loops.One`. Raises NotImplementedError where only whole batches can be asked for."""

    def close(self) -> None: ...


def make(name: str, folder: Path, *, context: int, streams: int) -> Peer:
    """The peer of that name (PEERS), loaded. Raises Absent, KeyError.

    folder: the model as transformers reads it; of OpenVINO that with its converted ones.
    context: tokens of one sequence at most. streams: sequences at once at most.
    """
    return PEERS[name](folder, context, streams)


class InProcess:
    """Our engine, however it was started."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        return closed_loop(requests, streams, self.one)

    def beside(
        self, background: Sequence[Request], foreground: Sequence[Request]
    ) -> tuple[list[Answer], list[Answer]]:
        """See `loops.beside`."""
        return beside(background, foreground, self.one)

    def one(self, request: Request, answer: Answer) -> None:
        """Submit one request and read it to its end. Any thread."""
        from service.engine.params import SamplingParams

        params = SamplingParams(max_tokens=request.tokens, temperature=0.0)
        answer.prompt_tokens = len(request.ids)
        stream = self.engine.submit(request.ids, params)
        while tokens := stream.read(SILENCE_S):
            answer.times += [time.perf_counter()] * len(tokens)
        answer.tokens = len(answer.times)
        if answer.tokens != request.tokens:
            raise RuntimeError(f"{answer.tokens} tokens came, {request.tokens} were asked for")


class Ours(InProcess):
    """A deployment from its words, as `moorage serve` brings it up: strategy `cpu`, defaults."""

    def __init__(self, folder: Path, context: int, streams: int, **words: str) -> None:
        """words: more of the deployment's."""
        from service.config.compute_threads import compute_environment
        from service.config.compute_threads import usable_cores
        from service.config.environment import set_missing

        set_missing(compute_environment(usable_cores()))  # as gunicorn's hook does
        import torch
        import transformers

        from service import __version__
        from service.config import reading
        from service.deployment import Deployment

        words |= {
            "model": str(folder),
            "strategy": "cpu",
            "max_context": str(context),
            "max_sequences": str(streams),
        }
        settings = tuple((key, value, "benchmark") for key, value in words.items())
        self._deployment = Deployment(reading.load(None, {}, reading.Flags(settings=settings)))
        came = threading.Event()
        self._deployment.on_ready = lambda model_id: came.set()
        self._deployment.on_failure = lambda error: came.set()
        self._deployment.start()
        came.wait()
        if self._deployment.error is not None:
            raise self._deployment.error
        super().__init__(self._deployment.serving().engine)
        self.detail = {
            "moorage": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "quantize": words.get("quantize", "none"),
            "path": self.engine.path,
            "threads": torch.get_num_threads(),
            "warnings": self._deployment.document()["warnings"],
        }

    def close(self) -> None:
        self._deployment.drain(0)


class _Transformers:
    """What two peers share: the model as transformers loads it, in its own number format."""

    def __init__(self, folder: Path, context: int, streams: int) -> None:
        import torch
        import transformers

        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        self.model.eval()
        # no early end: the model's own end token is forgotten
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, pad_token_id=0, max_new_tokens=context
        )
        self.detail: dict[str, Any] = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(self.model.dtype),
            "threads": torch.get_num_threads(),
        }

    def one(self, request: Request, answer: Answer) -> None:
        raise NotImplementedError

    def close(self) -> None:
        return


class LockedGenerate(_Transformers):
    """`model.generate` behind a lock: what a plain web application does."""

    def __init__(self, folder: Path, context: int, streams: int) -> None:
        super().__init__(folder, context, streams)
        self._lock = threading.Lock()

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        return closed_loop(requests, streams, self.one)

    def one(self, request: Request, answer: Answer) -> None:
        import torch

        answer.prompt_tokens = len(request.ids)
        ids = torch.tensor([request.ids])
        with self._lock:
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=request.tokens,
                streamer=_Times(answer),
            )
        answer.tokens = len(answer.times)


class _Times:
    """A streamer for `generate` that notes when a token came. The prompt is put first."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._prompt = True

    def put(self, value: object) -> None:
        if not self._prompt:
            self._answer.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        return


class ContinuousBatching(_Transformers):
    """transformers' own continuous batching, with as much cache as `streams` need."""

    PAGE = 256
    BATCH_TOKENS = 512

    def __init__(self, folder: Path, context: int, streams: int) -> None:
        super().__init__(folder, context, streams)
        from transformers import ContinuousBatchingConfig
        from transformers import GenerationConfig

        # without a bound it takes most of the machine's memory
        blocks = streams * -(-context // self.PAGE) + 1
        self._manager: Any = self.model.init_continuous_batching(
            generation_config=GenerationConfig(
                do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=context
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=self.PAGE, num_blocks=blocks, max_batch_tokens=self.BATCH_TOKENS
            ),
        )
        self._manager.start()
        self.detail |= {"num_blocks": blocks, "max_batch_tokens": self.BATCH_TOKENS}

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        answers: dict[str, Answer] = {}
        waiting = list(enumerate(requests))[::-1]

        def submit() -> None:
            index, request = waiting.pop()
            began = time.perf_counter()
            name = self._manager.add_request(
                list(request.ids),
                request_id=f"{began}-{index}",
                max_new_tokens=request.tokens,
                record_timestamps=True,
                eos_token_id=-1,
            )
            if name is None:
                raise RuntimeError("transformers takes no more requests")
            answers[name] = Answer(began, prompt_tokens=len(request.ids))

        for _ in range(min(streams, len(waiting))):
            submit()
        for _ in requests:
            output = self._manager.get_result(timeout=SILENCE_S)
            if output is None:
                raise RuntimeError("transformers' continuous batching ended or is silent")
            answer = answers[output.request_id]
            answer.times = list(output.timestamps or ())
            answer.tokens = len(output.generated_tokens)
            answer.error = output.error
            if waiting:
                submit()
        return list(answers.values())

    def close(self) -> None:
        self._manager.stop(block=True)


class OpenVino:
    """OpenVINO GenAI's continuous batching; the model converted beforehand."""

    def __init__(self, folder: Path, context: int, streams: int, weights: str = "fp16") -> None:
        import os

        try:
            import openvino
            import openvino_genai as genai
        except ImportError as error:
            raise Absent(f"{error}; see docs/benchmarks.md") from None
        converted = folder / weights
        if not converted.is_dir():
            raise Absent(f"{converted} is not there; see docs/benchmarks.md")
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GiB
        scheduler.max_num_seqs = streams
        scheduler.enable_prefix_caching = False
        self._pipe = genai.ContinuousBatchingPipeline(
            converted, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._genai, self._tensor = genai, openvino.Tensor
        self._number = 0
        self.detail = {
            "openvino-genai": genai.__version__,
            "weights": weights,
            "threads": threads,
        }

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        import numpy

        waiting = list(requests)[::-1]
        running: list[tuple[Any, Answer]] = []
        answers: list[Answer] = []
        while waiting or running:
            while waiting and len(running) < streams:
                request = waiting.pop()
                config = self._genai.GenerationConfig()
                config.max_new_tokens = request.tokens
                config.ignore_eos = True
                config.do_sample = False
                ids = self._tensor(numpy.array([request.ids], dtype=numpy.int64))
                answer = Answer(time.perf_counter(), prompt_tokens=len(request.ids))
                answers.append(answer)
                self._number += 1
                running.append((self._pipe.add_request(self._number, ids, config), answer))
            self._pipe.step()
            now = time.perf_counter()
            for handle, answer in running:
                while handle.can_read():
                    for output in handle.read().values():
                        answer.times += [now] * len(output.generated_ids)
                        answer.tokens += len(output.generated_ids)
            left = [(handle, answer) for handle, answer in running if not _finished(handle)]
            running = left
        return answers

    def one(self, request: Request, answer: Answer) -> None:
        raise NotImplementedError

    def close(self) -> None:
        del self._pipe


def _finished(handle: Any) -> bool:
    return handle.get_status().name != "RUNNING" and not handle.can_read()


PEERS: dict[str, Callable[[Path, int, int], Peer]] = {
    "moorage": Ours,
    "moorage compiled": partial(Ours, compile="true"),
    "moorage int8": partial(Ours, quantize="int8"),
    "moorage int4": partial(Ours, quantize="int4"),
    "transformers generate, locked": LockedGenerate,
    "transformers continuous batching": ContinuousBatching,
    "openvino fp16": OpenVino,
    "openvino int8": partial(OpenVino, weights="int8"),
}
