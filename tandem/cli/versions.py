"""`tandem version`, and what is installed."""

from __future__ import annotations

import platform
from importlib import metadata

from tandem.cli.terminal import output

DISTRIBUTION = "tandem-serve"
_SHOWN = ("torch", "grpcio", "protobuf")


def installed(name: str) -> str | None:
    """The installed version of a distribution; None if it is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run_version() -> None:
    libraries = [f"{name} {installed(name) or 'missing'}" for name in _SHOWN]
    details = ", ".join([f"Python {platform.python_version()}", *libraries])
    output().print(f"tandem {installed(DISTRIBUTION) or '(not installed)'} ({details})", soft_wrap=True)
