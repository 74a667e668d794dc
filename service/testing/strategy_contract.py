"""`StrategyContract`: inherit from it, and pytest holds your strategy to the contract."""

import inspect
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from typing import ClassVar

import pytest

from service.placement.hardware import Hardware
from service.testing import case as cases
from service.testing import contract
from service.testing.case import Case
from service.testing.simulated_check import works_on_simulated_accelerators


class StrategyContract:
    """Every check of the contract, as a test.

        class TestMine(StrategyContract):
            strategy = "mine.py"

    strategy: a file, relative to that of the test, or the name of an installed strategy.
    settings: keys of the deployment, as in moorage.yaml, `options` among them. model: a folder
    with a small model of your own; a tiny Llama if None. hardware: where it is loaded; this
    machine if None. Or override the fixture `case`.
    """

    strategy: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    model: ClassVar[Path | None] = None
    hardware: ClassVar[Hardware | None] = None

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
        """The strategy with its model, shared by the tests of this class."""
        name = cls.strategy
        if name.endswith(".py"):
            name = str(Path(inspect.getfile(cls)).parent / name)
        made = Case(
            cases.find(name),
            tmp_path_factory.mktemp("contract"),
            model=cls.model,
            hardware=cls.hardware,
            settings=cls.settings,
        )
        yield made
        made.drop()

    def test_imports_lightly(self, case: Case) -> None:
        _hold(contract.imports_lightly, case)

    def test_plan_reads_no_weights(self, case: Case) -> None:
        _hold(contract.plan_reads_no_weights, case)

    def test_plan_depends_on_its_arguments(self, case: Case) -> None:
        _hold(contract.plan_depends_on_its_arguments, case)

    def test_refuses_an_empty_machine(self, case: Case) -> None:
        _hold(contract.refuses_an_empty_machine, case)

    def test_works_on_simulated_accelerators(self, case: Case) -> None:
        _hold(works_on_simulated_accelerators, case)

    def test_load_restores_globals(self, case: Case) -> None:
        _hold(contract.load_restores_globals, case)

    def test_load_returns_a_model(self, case: Case) -> None:
        _hold(contract.load_returns_a_model, case)

    def test_load_leaves_nothing_on_meta(self, case: Case) -> None:
        _hold(contract.load_leaves_nothing_on_meta, case)

    def test_declares_offload(self, case: Case) -> None:
        _hold(contract.declares_offload, case)

    def test_validate_accepts_the_model(self, case: Case) -> None:
        _hold(contract.validate_accepts_the_model, case)

    def test_place_inputs_keeps_inputs(self, case: Case) -> None:
        _hold(contract.place_inputs_keeps_inputs, case)

    def test_forward_equals_reference(self, case: Case) -> None:
        _hold(contract.forward_equals_reference, case)

    def test_is_certified(self, case: Case) -> None:
        _hold(contract.is_certified, case)

    def test_validate_rejects_faults(self, case: Case) -> None:
        _hold(contract.validate_rejects_faults, case)

    def test_release_lets_the_model_die(self, case: Case) -> None:
        _hold(contract.release_lets_the_model_die, case)


def _hold(check: Callable[[Case], str], case: Case) -> None:
    try:
        check(case)
    except cases.NotRun as reason:
        pytest.skip(str(reason))
