"""The real SmolLM2 with a chat template that knows tools: its own does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.server import ROOT
from tests.support.server import environment
from tests.support.templates import HERMES

CACHE = Path(os.environ.get("MOORAGE_CACHE", Path.home() / ".cache/moorage"))


def fetch(name: str) -> None:
    """Fetch a model as a user would; at once if it is there."""
    command = [sys.executable, "-m", "service.cli", "model", "fetch", name]
    subprocess.run(command, check=True, cwd=ROOT, env=environment(), capture_output=True)


def copy_with_tools(folder: Path) -> Path:
    """Copy the fetched model into `folder`, which must not exist, with the other template."""
    shutil.copytree(CACHE / "models/smollm2-135m", folder)
    (folder / "moorage.json").unlink(missing_ok=True)  # the sums of the files that were fetched
    (folder / "chat_template.jinja").write_text(HERMES)
    return folder
