"""The gateway's settings from flags and variables."""

import pytest

from gateway.routing import Role
from gateway.settings import GatewaySettings
from gateway.targets import Target
from tandem.config import KNOWN_VARIABLES, load_settings, settings_of


def load(*argv: str, **environ: str) -> GatewaySettings:
    return load_settings(GatewaySettings, argv, environ, "test")


def test_defaults_fit_workers_on_this_machine() -> None:
    settings = load()
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 50051)
    assert settings.targets == [(Role.PREFILL, Target("127.0.0.1", 50061)), (Role.DECODE, Target("127.0.0.1", 50071))]


def test_flags_and_variables() -> None:
    settings = load("--decode-targets", "a:1,dns:///b:2", "--max-running", "3", TANDEM_PREFILL_TARGETS="c:3", TANDEM_PORT="9")
    assert [target.host for _, target in settings.targets] == ["c", "a", "b"]
    assert settings.targets[2] == (Role.DECODE, Target("b", 2, by_name=True))
    assert (settings.admission.max_running, settings.server.port) == (3, 9)


@pytest.mark.parametrize("argv", [["--prefill-targets", "nowhere"], ["--max-running", "0"], ["--stall-limit-s", "0"]])
def test_malformed_values_are_fatal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        load(*argv)
    assert raised.value.code == 2
    assert argv[1] in capsys.readouterr().err


def test_no_setting_hides_one_of_the_servers() -> None:
    variables = {setting.variable for setting in settings_of(GatewaySettings)}
    assert {"TANDEM_HOST", "TANDEM_PORT", "TANDEM_GRACE_S", "TANDEM_MODEL", "TANDEM_PREFILL_TARGETS"} <= variables
    assert "TANDEM_CACHE_DIR" in KNOWN_VARIABLES
