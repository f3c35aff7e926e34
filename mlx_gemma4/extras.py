"""Packages that only some uses need: the extras of pyproject.toml."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

from .errors import ConfigError


def import_extra(module: str, extra: str, *, at_least: int = 0) -> Any:
    """A module of a package that an extra installs.

    Args:
        at_least: the first major version that will do.

    Raises:
        ConfigError: it is not installed, or older; with the line that installs it.
    """
    package = module.split(".")[0]
    try:
        found = importlib.import_module(module)
        version = importlib.metadata.version(package) if at_least else ""
        if not at_least or int(version.split(".")[0]) >= at_least:
            return found
        reason = f"{package} {version} is installed"
    except ImportError as error:
        reason = f"{package} is not installed ({error})"
    wanted = f"{package} {at_least} or later" if at_least else package
    raise ConfigError(reason, wanted=wanted, do=f'pip install "mlx-gemma4[{extra}]"') from None
