"""Where each value of the configuration came from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """The source of one value.

    `layer` is one of "built-in", "strategy", "file", "env", "flag"; `name` is the file's path as
    given, the variable's or the flag's name, or the strategy's name; `line` and `column` count
    from 1; `source` is the line of the file.
    """

    layer: str
    name: str = ""
    line: int | None = None
    column: int | None = None
    source: str | None = None

    def __str__(self) -> str:
        if self.layer == "built-in":
            return "built-in"
        if self.layer == "file":
            return f"{self.name}:{self.line}"
        return f"{self.layer} {self.name}"

    def where(self) -> str:
        """As `str`, with the column where there is one: the form error messages start with."""
        return f"{self}:{self.column}" if self.column is not None else str(self)


BUILT_IN = Origin("built-in")
