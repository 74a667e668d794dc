"""What authors of strategies import.

from service.testing import StrategyContract     # pytest: every check of the contract
from service.testing.tiny import save_tiny       # a tiny model to load
from service.testing.machines import cards       # a machine you do not have
"""

from typing import TYPE_CHECKING
from typing import Any

if TYPE_CHECKING:
    from service.testing.strategy_contract import StrategyContract

__all__ = ["StrategyContract"]


def __getattr__(name: str) -> Any:
    """`StrategyContract` when asked for: it needs pytest, the command line does not."""
    if name == "StrategyContract":
        from service.testing.strategy_contract import StrategyContract

        return StrategyContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
