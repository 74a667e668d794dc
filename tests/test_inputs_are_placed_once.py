"""Safe inputs by construction: one place in the code moves them, one place asks the strategy to.

`ids.to(model.device)` is how a server meets the meta device (F7).
"""

import ast
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.params import SamplingParams
from service.engine.runner import Runner
from tests.support.tiny import tiny_model

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "service").rglob("*.py")) + sorted((ROOT / "plugins").rglob("*.py"))
MOVER = "service/placement/inputs.py"
# every method of a tensor or a module that moves it to a device
MOVES = {"to", "cuda", "xpu", "npu", "mps", "hpu", "to_empty", "pin_memory"}
# results come back from a device: that is no input, and always the same one
HOME = {"cpu"}
# these move weights on purpose: a fault to be caught, a device that is pretended
FAULTS = {"service/testing/pretended.py", "service/testing/self_test/values.py"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the function it is in, dotted: "Runner.step"."""

    def walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[str, ast.Call]]:
        for child in ast.iter_child_nodes(node):
            here = inside
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                here = (*inside, child.name)
            if isinstance(child, ast.Call):
                yield ".".join(inside), child
            yield from walk(child, here)

    return walk(tree, ())


def moves(source: str) -> list[str]:
    """The calls in a source that move a tensor to a device. A cast alone is none."""
    found = []
    for _, call in calls(ast.parse(source)):
        if not isinstance(call.func, ast.Attribute) or call.func.attr not in MOVES:
            continue
        given = [*call.args, *(k.value for k in call.keywords if k.arg not in ("dtype", "copy"))]
        if call.func.attr == "to" and (all(map(_is_dtype, given)) or _goes_home(call)):
            continue
        found.append(ast.unparse(call))
    return found


def _is_dtype(node: ast.expr) -> bool:
    """torch.float32 and the like, written out, or some tensor's own."""
    if isinstance(node, ast.Name):
        return node.id == "dtype"
    if not isinstance(node, ast.Attribute):
        return False
    if node.attr in ("dtype", "element_ty"):
        return True
    return (
        isinstance(node.value, ast.Name)
        and node.value.id in ("torch", "tl")
        and isinstance(getattr(torch, node.attr, None), torch.dtype)
    )


def _goes_home(call: ast.Call) -> bool:
    """`.to("cpu")`, written out."""
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant) and first.value == "cpu"


def asks(source: str) -> list[str]:
    """The functions in a source that call a `place_inputs`, by whatever reference."""
    found = []
    for inside, call in calls(ast.parse(source)):
        function = call.func
        called = (
            function.attr
            if isinstance(function, ast.Attribute)
            else function.id
            if isinstance(function, ast.Name)
            else function.slice.value
            if isinstance(function, ast.Subscript) and isinstance(function.slice, ast.Constant)
            else ""
        )
        if isinstance(called, str) and called.strip("_") == "place_inputs":
            found.append(inside)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("ids.to(model.device)", True),
        ("ids.to('cuda')", True),
        ("ids.to(device=device)", True),
        ("ids.to(device, non_blocking=True)", True),
        ("ids.to(other)", True),
        ("ids.to(torch.float16, device)", True),
        ("ids.cuda()", True),
        ("{k: v.to(d) for k, v in inputs.items()}", True),
        ("logits.to(torch.float32)", False),
        ("logits.to(dtype=torch.float32)", False),
        ("logits.float().cpu()", False),
        ("logits.to('cpu', non_blocking=True)", False),
        ("key.to(pages.dtype)", False),
    ],
)
def test_this_test_sees_a_move(source: str, found: bool) -> None:
    assert bool(moves(source)) == found


@pytest.mark.parametrize(
    "source",
    [
        "strategy.place_inputs(model, inputs)",
        "self._place_inputs(model=model, inputs=inputs)",
        "place_inputs(model, inputs)",
        "hooks['place_inputs'](model=model, inputs=inputs)",
    ],
)
def test_this_test_sees_a_call_of_the_hook(source: str) -> None:
    assert asks(f"def step():\n    {source}") == ["step"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_but_one_module_moves_tensors_to_a_device(path: Path) -> None:
    found = moves(path.read_text())
    if name(path) == MOVER:
        # inputs, by the strategies' default; what a step needs beside them
        assert sorted(set(found)) == ["tensor.pin_memory()", "tensor.to(device, non_blocking=True)"]
        assert len(found) == 3
    elif name(path) not in FAULTS:
        assert not found, f"{name(path)} moves tensors itself; call to_input_device or place"


def test_results_come_home_in_few_places_only() -> None:
    """`.cpu()` is for logits, and for comparing: what `place_inputs` returned, and weights."""
    found = {
        (name(path), inside)
        for path in FILES
        for inside, call in calls(ast.parse(path.read_text()))
        if isinstance(call.func, ast.Attribute) and call.func.attr in HOME
    }
    assert found == {
        ("service/engine/embedding.py", "EmbeddingRunner._rows"),
        ("service/engine/plain.py", "Plain._generated"),
        ("service/engine/plain.py", "Plain._uncached"),
        ("service/engine/plain.py", "Plain.prove"),
        ("service/engine/proof.py", "own_logits"),
        ("service/engine/proof.py", "prove"),
        ("service/placement/checks.py", "inputs_are_placed"),
        ("service/placement/checks_values.py", "_at_home"),
    }


def test_the_hook_is_called_in_one_place() -> None:
    """And the registry hands the bound hook on."""
    found = [(name(path), inside) for path in FILES for inside in asks(path.read_text())]
    assert sorted(found) == [
        (MOVER, "place"),
        ("service/placement/registry.py", "Strategy.place_inputs"),
    ]


def test_nobody_asks_a_model_for_its_device_but_to_report_it() -> None:
    """`model.device` is the first parameter's, and meta when that is offloaded."""
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text())
        quoted = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in ast.walk(node)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "device"
                and ast.unparse(node.value).rpartition(".")[2].strip("_") == "model"
                and id(node) not in quoted
            ):
                found.add(f"{name(path)}:{node.lineno}")
    assert not found


class Counted:
    """A `place_inputs` and a forward hook that count."""

    def __init__(self) -> None:
        self.placed = 0
        self.forwards = 0

    def place_inputs(
        self, *, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        self.placed += 1
        return dict(inputs)

    def forward(self, module: Any, args: Any) -> None:
        self.forwards += 1


def test_inputs_are_placed_once_a_step() -> None:
    counted, model = Counted(), tiny_model("llama")
    model.register_forward_pre_hook(counted.forward)
    engine = Engine(
        Runner(model, counted.place_inputs, max_context=64, max_sequences=2, step_tokens=4),
        max_queue=8,
    )
    engine.start()
    warm_up = counted.placed
    # the model's own logits, what its layers hand over, three steps of proof, two of trial
    assert warm_up == counted.forwards == 7
    streams = [
        engine.submit(list(range(1, length)), SamplingParams(max_tokens=5, temperature=0.0))
        for length in (3, 11, 6)
    ]
    answers = []
    for stream in streams:
        tokens: list[int] = []
        while more := stream.read(60.0):
            tokens += more
        answers.append(tokens)
    engine.drain(5.0)
    engine.close()
    assert [len(tokens) for tokens in answers] == [5, 5, 5]
    assert counted.placed == counted.forwards
    assert engine.stats().steps == counted.placed - warm_up
