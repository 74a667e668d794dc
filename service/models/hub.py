"""A model repository of the Hugging Face hub, as a folder of this machine.

The files stay in the hub's own cache, so what other programs have downloaded is used. The folder's
name is the commit that the revision meant at that moment; everything is read from that commit.
"""

import re
from collections.abc import Callable
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from service.errors import ModelUnavailable
from service.models import sentence_files
from service.models.catalogue import CATALOGUE

Report = Callable[[str, float], None]

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIG_ONLY = ("config.json", *sentence_files.SMALL)
WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt")
SAFETENSORS = (*WITHOUT_WEIGHTS, "*.safetensors")
PICKLED = (*WITHOUT_WEIGHTS, "pytorch_model*.bin")
CODE = ("*.py",)
# A second copy of the weights in another layout, and formats that are not ours.
NOT_WANTED = ("consolidated*", "original/*", "onnx/*", "openvino/*", "*/*.safetensors", "*/*.bin")


def is_id(text: str) -> bool:
    """Whether the text could be a hub id: OWNER/NAME, without revision."""
    return ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def snapshot(repo: str, revision: str | None, patterns: Sequence[str], report: Report) -> Path:
    """Download the files of a repository that match `patterns`, or find them in the cache.

    Raises ModelUnavailable: hub out of reach and nothing in the cache, no such repository or
    revision, no access, disk.
    """
    import huggingface_hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import tqdm

    class Bars(tqdm):
        """The hub's own bars, shown to nobody but `report`."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.is_bytes = options.get("unit") == "B"
            super().__init__(  # type: ignore[no-untyped-call]
                *arguments, **{**options, "disable": False, "file": _Nowhere()}
            )

        def update(self, n: float | None = 1) -> bool | None:
            shown: bool | None = super().update(n)
            if self.is_bytes and self.total:
                report(f"downloading {repo}", min(1.0, self.n / self.total))
            return shown

    name = repo if revision is None else f"{repo}@{revision}"
    report(f"looking for {name}", 0.0)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(NOT_WANTED),
                tqdm_class=Bars,
                library_name="moorage",
            )
        )
    except errors.GatedRepoError:
        raise ModelUnavailable(
            f"{name}: access is restricted",
            hint=f"accept its terms at huggingface.co/{repo} and set HF_TOKEN",
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelUnavailable(
            f"{repo}: has no revision {revision!r}", hint="give a branch, a tag or a commit"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelUnavailable(
            f"{repo}: no such model on the hub, or it is private",
            hint=f"check the spelling, set HF_TOKEN for a private one; {_elsewhere()}",
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(name, error) from None
    except errors.HfHubHTTPError as error:
        raise ModelUnavailable(
            f"{name}: the hub answered {_first_line(error)}",
            hint=f"try again later; {_elsewhere()}",
        ) from None
    except errors.HFValidationError as error:
        raise ModelUnavailable(f"{name}: {_first_line(error)}", hint=_elsewhere()) from None
    except OSError as error:
        if error.errno is None:
            raise _unreachable(name, error) from None
        raise ModelUnavailable(
            f"{name}: {error.strerror} ({error.filename or 'while downloading'})",
            hint="free some space, or set HF_HOME to a folder on another disk",
        ) from None
    except (
        Exception
    ) as error:  # the HTTP library's own errors, whose package has changed its name before
        raise _unreachable(name, error) from None


class _Nowhere:
    """A terminal for bars that nobody looks at."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        """Nothing is kept."""


def _elsewhere() -> str:
    return (
        f"for a folder of yours write ./folder; models that need no hub: {', '.join(CATALOGUE)} "
        "(moorage model list)"
    )


def _unreachable(name: str, error: Exception) -> ModelUnavailable:
    return ModelUnavailable(
        f"{name}: not on this machine, and the hub cannot be reached ({_first_line(error)})",
        hint=_elsewhere(),
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
