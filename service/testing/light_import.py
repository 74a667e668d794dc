"""Import one strategy where there is no torch, no GPU and no optional package.

Runs in a process of its own, because where strategies are checked torch is long imported.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

HEAVY = ("torch", "transformers", "accelerate", "bitsandbytes")


class _NotThere:
    """A finder that lets nobody find the heavy packages."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"it imports {name}", name=name)
        return None


def main(source: str) -> int:
    """Import the strategy of this source, and write to stdout what went wrong.

    source: as the registry says it; the path of a file, or what names a built-in or installed one.
    Returns 0 if it was imported, else 1.
    """
    from service.placement import finding

    sys.meta_path.insert(0, _NotThere())
    files = [Path(source)] if Path(source).is_file() else []
    for found in finding.find((), files):
        if found.source != source:
            continue
        try:
            found.fetch()
        except Exception as error:  # an import runs the author's code, which may raise anything
            sys.stdout.write(finding.describe(error))
            return 1
        return 0
    sys.stdout.write(f"{source} was not found again")
    return 1
