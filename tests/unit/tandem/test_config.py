"""Settings from flags and variables: what wins, and that nothing wrong passes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.config import KNOWN_VARIABLES, load_settings, settings_of
from tandem.server import ServerSettings


@dataclass(frozen=True)
class Inner:
    lease_s: float = field(default=5.0, metadata={"help": "100 % of a lease", "minimum": 0})
    transports: tuple[str, ...] = field(default=("shm", "tcp"), metadata={"help": "ways"})
    sizes: tuple[int, ...] = field(default=(), metadata={"help": "sizes", "minimum": 1})


@dataclass(frozen=True)
class Outer:
    model: str = field(metadata={"help": "the model"})
    max_tokens: int = field(default=16, metadata={"help": "most tokens", "minimum": 1, "maximum": 100})
    prefix_cache: bool = field(default=True, metadata={"help": "keep prefixes"})
    dtype: Literal["auto", "float32"] = field(default="auto", metadata={"help": "format"})
    cache: Path | None = field(default=None, metadata={"help": "folder"})
    threads: int | None = field(default=2, metadata={"help": "threads"})
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.model == "forbidden":
            raise ValueError("--model: 'forbidden' is not legal; it takes another model")


def load(*argv: str, **environ: str) -> Outer:
    return load_settings(Outer, argv, environ, "A test.")


def refused(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load(*argv, **environ)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_defaults():
    assert load("--model", "m") == Outer(model="m")


def test_flags_of_every_type():
    settings = load(
        *("--model", "m", "--max-tokens", "7", "--no-prefix-cache", "--dtype", "float32", "--cache", "/tmp/c"),
        *("--threads", "none", "--lease-s", "2.5", "--transports", "tcp, shm", "--sizes", "1,2"),
    )
    assert settings == Outer("m", 7, False, "float32", Path("/tmp/c"), None, Inner(2.5, ("tcp", "shm"), (1, 2)))


def test_variables_of_every_type():
    settings = load(
        TANDEM_MODEL="m",
        TANDEM_MAX_TOKENS="7",
        TANDEM_PREFIX_CACHE="False",
        TANDEM_DTYPE="float32",
        TANDEM_CACHE="/tmp/c",
        TANDEM_THREADS="none",
        TANDEM_LEASE_S="2.5",
        TANDEM_TRANSPORTS="tcp",
        TANDEM_SIZES="",
        PATH="/bin",
    )
    assert settings == Outer("m", 7, False, "float32", Path("/tmp/c"), None, Inner(2.5, ("tcp",), ()))


def test_flags_win_and_an_empty_variable_counts_as_unset():
    assert load("--model", "flag", TANDEM_MODEL="variable").model == "flag"
    assert load("--prefix-cache", "--model=m", TANDEM_PREFIX_CACHE="off").prefix_cache is True
    assert load("--model", "m", TANDEM_MAX_TOKENS="").max_tokens == 16


@pytest.mark.parametrize(
    ("name", "text", "legal"),
    [
        ("max-tokens", "seven", "an integer at least 1 and at most 100"),
        ("max-tokens", "0", "an integer at least 1 and at most 100"),
        ("max-tokens", "101", "an integer"),
        ("max-tokens", "1e2", "an integer"),
        ("dtype", "int8", "one of auto, float32"),
        ("lease-s", "nan", "a number at least 0"),
        ("lease-s", "inf", "a number"),
        ("lease-s", "-1", "a number"),
        ("threads", "many", "an integer or none"),
        ("sizes", "1,x", "a comma-separated list; each an integer"),
        ("sizes", "1,0", "at least 1"),
    ],
)
def test_malformed_values_are_fatal_and_name_key_value_and_what_is_legal(capsys, name, text, legal):
    message = refused(capsys, "--model", "m", f"--{name}={text}")
    assert f"--{name}: {text!r} is not legal; it takes" in message and legal in message
    variable = "TANDEM_" + name.replace("-", "_").upper()
    message = refused(capsys, "--model", "m", **{variable: text})
    assert f"{variable}: {text!r} is not legal; it takes" in message and legal in message


def test_malformed_booleans_are_fatal(capsys):
    assert "TANDEM_PREFIX_CACHE: 'maybe' is not legal; it takes true or false" in refused(
        capsys, TANDEM_PREFIX_CACHE="maybe", TANDEM_MODEL="m"
    )


def test_unknown_variable_is_fatal_and_hints_at_the_right_one(capsys):
    message = refused(capsys, "--model", "m", TANDEM_MAX_TOKEN="7")
    assert "TANDEM_MAX_TOKEN='7': unknown variable; did you mean TANDEM_MAX_TOKENS?" in message
    assert "TANDEM_PREFIX_CACHE" in message


def test_variables_of_the_suites_other_programs_are_accepted():
    others = KNOWN_VARIABLES - {setting.variable for setting in settings_of(Outer)}
    assert load("--model", "m", **dict.fromkeys(others, "x")) == Outer("m")


def test_missing_required_setting_is_fatal(capsys):
    assert "--model (or TANDEM_MODEL) is required; it takes a text" in refused(capsys)


def test_unknown_and_abbreviated_flags_are_fatal(capsys):
    assert "--colour" in refused(capsys, "--model", "m", "--colour", "red")
    assert "--max-tok" in refused(capsys, "--model", "m", "--max-tok", "7")


def test_rules_between_fields_are_fatal_too(capsys):
    assert "--model: 'forbidden'" in refused(capsys, "--model", "forbidden")


def test_help_names_flag_variable_default_and_range(capsys):
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "100 % of a lease (a number at least 0; default: 5.0; TANDEM_LEASE_S)" in text
    assert "the model (a text; required; TANDEM_MODEL)" in text


def test_server_settings_are_known_to_every_program():
    assert {setting.variable for setting in settings_of(ServerSettings)} <= KNOWN_VARIABLES
    assert load_settings(ServerSettings, ["--port", "50051"], {}, "").port == 50051


def test_two_settings_of_one_name_are_a_bug():
    @dataclass(frozen=True)
    class Twice:
        lease_s: float = 1.0
        inner: Inner = field(default_factory=Inner)

    with pytest.raises(AssertionError, match="two settings called lease_s"):
        load_settings(Twice, [], {}, "")


@given(st.text())
def test_any_text_is_either_a_number_in_range_or_fatal(text):
    try:
        settings = load("--model", "m", "--max-tokens=" + text)
    except SystemExit as end:
        assert end.code == 2
    else:
        assert 1 <= settings.max_tokens <= 100
