"""Model files, as commands read them."""

import os
from typing import Any

from .errors import CommandError


def load(path: str) -> Any:
    """The estimator in a file that `nwfast fit` wrote."""
    if not os.path.exists(path):
        raise CommandError(f"there is no file {path!r}")
    if os.path.isdir(path):
        raise CommandError(f"{path!r} is a directory, not a model")
    from ..estimators import storage
    from ..estimators.model import KINDS

    try:
        return storage.load(path, KINDS)
    except ValueError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot read {path!r}: {error.strerror or error}") from error


def features_of(model: Any) -> list[str]:
    """The names of its inputs."""
    return list(model.report_["features"])
