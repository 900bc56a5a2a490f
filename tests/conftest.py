"""What all tests share: an environment without the developer's own settings."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.fakes.clock import Clock

# On a busy machine a single example may take any time; each test has a limit of its own.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")


def _forget_own_settings() -> None:
    for key in [key for key in os.environ if key.startswith(("TANDEM_", "OTEL_")) and key != "TANDEM_CACHE_DIR"]:
        del os.environ[key]


_forget_own_settings()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def clock() -> Clock:
    """Stands still until the test moves it."""
    return Clock()
