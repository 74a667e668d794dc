"""`moorage plugins new`: a strategy to go on from, as a distribution of its own with its tests.

The files are in `new_strategy/`, as those of a strategy called my-strategy.
"""

import importlib.util
import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from service.cli import options
from service.cli import plugins
from service.cli import report

FILES = Path(__file__).parent / "new_strategy"
# how the strategy is called in them: as a name, as a module, as a class
NAME, MODULE, CLASS = "my-strategy", "my_strategy", "MyStrategy"


@report.guard
def new(
    name: Annotated[str, typer.Argument(help="The strategy's name, such as last-gpu.")],
    folder: Annotated[
        Path | None,
        typer.Option("--into", metavar="FOLDER", help="Where to write it. Default: ./NAME."),
    ] = None,
    config: options.Config = None,
    deployment: options.Deployment = None,
    as_json: options.AsJson = False,
) -> None:
    """Write a strategy that works, with its tests, to go on from: the guide's twenty lines."""
    _check_name(name)
    taken = plugins.registry_of(config, deployment).sources.get(name)
    if taken:
        raise typer.BadParameter(f"there is a strategy {name} already: {taken[0]}; choose another")
    into = folder or Path(name)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        kind = "is not empty" if into.is_dir() else "is a file"
        raise typer.BadParameter(f"{into} {kind}; name a new folder with --into FOLDER")
    into.mkdir(parents=True, exist_ok=True)
    written = [write(path, name, into) for path in sorted(FILES.glob("*.txt"))]
    if as_json:
        report.print_json(
            {
                "object": "strategy-project",
                "strategy": name,
                "folder": str(into),
                "files": [path.name for path in written],
            }
        )
        return
    module = name.replace("-", "_")
    typer.echo(f"wrote {into}: {', '.join(path.name for path in written)}")
    typer.echo(f"\nnext\n  cd {into}")
    for command, why in (
        (f"moorage plugins check {module}.py", "holds it to the contract"),
        ("pip install -e '.[test]'", f"makes it `strategy: {name}` in every config"),
        ("pytest", "the contract again, and tests of your own"),
    ):
        typer.echo(f"  {command:<{26 + len(module)}}  # {why}")
    typer.echo(f"\nGo on in {module}.py: docs/plugin-guide.md grows it step by step.")


def write(template: Path, name: str, into: Path) -> Path:
    """One file of the strategy called `name`, from its template. Returns where it is."""
    module = name.replace("-", "_")
    text = template.read_text(encoding="utf-8").replace(NAME, name).replace(MODULE, module)
    class_name = "".join(part.capitalize() for part in name.split("-"))
    path = into / template.name.removesuffix(".txt").replace(MODULE, module)
    path.write_text(text.replace(CLASS, class_name), encoding="utf-8")
    return path


def _check_name(name: str) -> None:
    """Raise typer.BadParameter for what cannot be a strategy's name and its module's."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        words = re.findall(r"[a-z0-9]+", name.lower())
        meant = f"; did you mean {'-'.join(words)!r}?" if words and words[0][0].isalpha() else ""
        raise typer.BadParameter(
            f"{name!r} cannot name a strategy: lower-case letters, digits and single dashes, "
            f"a letter first{meant}"
        )
    module = name.replace("-", "_")
    if keyword.iskeyword(module) or importlib.util.find_spec(module) is not None:
        what = "a word of Python" if keyword.iskeyword(module) else "a module that is there already"
        raise typer.BadParameter(
            f"{name}: its module would be {module}.py, which is {what}; choose another name"
        )
