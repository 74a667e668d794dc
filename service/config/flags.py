"""What the command line says about the configuration, as data."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Flags:
    """The last layer of a configuration.

    config      --config; None: MOORAGE_CONFIG, else ./moorage.yaml if it is there, else no file
    deployment  --deployment; None: MOORAGE_DEPLOYMENT, else what the file says
    settings    (key, value as text, flag's name) in the order given, for example
                ("quantize", "nf4", "--quantize") or ("options.device", "1", "--set"). Keys of
                the server block start with "server."
    """

    config: Path | None = None
    deployment: str | None = None
    settings: tuple[tuple[str, str, str], ...] = ()
