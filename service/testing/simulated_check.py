"""The check of the contract that needs two accelerators, which are simulated."""

import json
import shutil
from collections.abc import Iterator

from service.config.schema import ModelConfig
from service.errors import DoesNotFit
from service.errors import PlacementUnavailable
from service.errors import PluginError
from service.placement.hardware import GIB
from service.testing import machines
from service.testing import simulation
from service.testing.case import Case
from service.testing.case import NotRun


def works_on_simulated_accelerators(case: Case) -> str:
    """On two simulated accelerators the planned map runs, with its inputs where they belong."""
    machine = machines.cards(24 * GIB, 24 * GIB)
    jobs = []
    for config in _configs(case):
        try:
            placement = case.strategy.plan(config, machine)
        except (PlacementUnavailable, DoesNotFit) as error:
            raise NotRun(f"plan refuses a machine with two GPUs: {error.message}") from None
        jobs.append(simulation.Job(config, case.strategy, placement))
    found = simulation.simulate_all(jobs)
    for made in found:
        if made.status == "refuted":
            hook = "place_inputs" if made.failure_class in (None, "F7") else "plan"
            raise PluginError(
                f"on {' and '.join(made.devices)}, simulated: {made.message} ({case.at(hook)})",
                hint=made.hint or "service.placement.planning.mapped makes maps that hold",
            )
    for made in found:
        if made.status == "not simulated":
            raise NotRun(f"not simulated: {made.message}")
    made, placement = found[0], jobs[0].placement
    if made.status == "not applicable":
        return f"not applicable: {made.message}"
    without = f"; without {', '.join(made.left_out)}" if made.left_out else ""
    cache = "; ".join(simulation.kv_lines(made, placement))
    return f"{made.operators} operators, none across devices; KV of {cache}{without}"


def _configs(case: Case) -> Iterator[ModelConfig]:
    """The deployment, and if the model is ours also with its head tied to its embedding."""
    yield case.config
    if case.brought:
        return
    folder = case.workspace / "tied-model"
    shutil.copytree(case.folder, folder, dirs_exist_ok=True)
    keys = json.loads((case.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**keys, "tie_word_embeddings": True}))
    yield case.configured(folder)
