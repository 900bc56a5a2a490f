"""The command line against a gateway that runs in this process."""

from collections.abc import Callable, Iterator

import pytest
from click.testing import Result
from typer.testing import CliRunner

from tandem.cli.app import app
from tests.service.cli.fake_gateway import FakeGateway

Cli = Callable[..., Result]


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    fake = FakeGateway()
    yield fake
    fake.stop()


@pytest.fixture
def cli() -> Cli:
    """Runs `tandem` with arguments, in this process."""

    def run(*arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(app, list(arguments), input=typed, env={"COLUMNS": "200"})

    return run
