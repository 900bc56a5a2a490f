"""Settings: frozen dataclasses, read once at start from flags and TANDEM_* variables; anything unknown or malformed is fatal."""

import argparse
import dataclasses
import difflib
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

PREFIX = "TANDEM_"

OTHER_VARIABLES: frozenset[str] = frozenset({"TANDEM_CACHE_DIR", "TANDEM_BASE", "TANDEM_PIP_ARGS"})
"""Read outside the settings classes: by all programs, and by compose.yaml."""

KNOWN_VARIABLES: frozenset[str] = OTHER_VARIABLES | frozenset(
    {
        # Every server.
        "TANDEM_HOST",
        "TANDEM_PORT",
        "TANDEM_GRACE_S",
        "TANDEM_EXIT_WITH_PARENT",
        "TANDEM_REFLECTION",
        "TANDEM_MAX_CONCURRENT_STREAMS",
        # Workers: weights, KV pool, hand-off.
        "TANDEM_MODEL",
        "TANDEM_DEVICE",
        "TANDEM_DTYPE",
        "TANDEM_KV_DTYPE",
        "TANDEM_WEIGHTS",
        "TANDEM_RESUME_WAIT_S",
        "TANDEM_THREADS",
        "TANDEM_KV_BLOCKS",
        "TANDEM_KV_MEMORY_MIB",
        "TANDEM_GPU_MEMORY_FRACTION",
        "TANDEM_BLOCK_TOKENS",
        "TANDEM_PREFIX_CACHE",
        "TANDEM_TRANSPORTS",
        "TANDEM_LEASE_S",
        "TANDEM_STALLED_LIMIT_S",
        "TANDEM_KV_HOST",
        "TANDEM_ADVERTISED_HOST",
        # Prefill workers.
        "TANDEM_TOKEN_BUDGET",
        "TANDEM_MAX_PROMPTS",
        # Decode workers.
        "TANDEM_MAX_BATCH",
        "TANDEM_MAX_SEQUENCES",
        "TANDEM_RECOMPUTE_BUDGET",
        # The gateway.
        "TANDEM_PREFILL_TARGETS",
        "TANDEM_DECODE_TARGETS",
        "TANDEM_MAX_RUNNING",
        "TANDEM_MAX_QUEUED",
        "TANDEM_MAX_QUEUED_TOKENS",
        "TANDEM_MAX_WAIT_S",
        "TANDEM_MAX_DEADLINE_S",
        "TANDEM_STALL_LIMIT_S",
    }
)
"""Every variable that some program of the suite reads. They share one environment, so each accepts the others' variables."""

T = TypeVar("T")
Convert = Callable[[str], Any]


class MalformedValueError(ValueError):
    """A text is not what the field takes; the message says what is legal."""


@dataclass(frozen=True)
class Setting:
    """One leaf field of a settings class: its names, what it takes and how a text becomes its value."""

    owner: type
    field: dataclasses.Field[Any]
    kind: Any

    @property
    def flag(self) -> str:
        return "--" + self.field.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.field.name.upper()

    @property
    def required(self) -> bool:
        return self.field.default is dataclasses.MISSING and self.field.default_factory is dataclasses.MISSING

    @property
    def legal(self) -> str:
        return _legal(self.kind) + _range_text(self.field.metadata)

    def convert(self, text: str) -> Any:
        value = _converter(self.kind)(text)
        _check_range(value, self.field.metadata)
        return value


def load_settings(cls: type[T], argv: Sequence[str], environ: Mapping[str, str], description: str) -> T:
    """An instance of the frozen dataclass `cls`, nested dataclasses included.

    A field `max_tokens` takes the flag `--max-tokens` and the variable TANDEM_MAX_TOKENS; flags win, and an empty variable counts
    as unset. `metadata` of a field may hold `help`, `minimum` and `maximum`. Field types: bool, int, float, str, Path, Literal,
    tuples of these (comma-separated), and `| None`, where "none" means None.

    Exits with status 2 and a message that names key, value and what is legal, if anything is unknown, malformed or missing.
    """
    settings = {setting.field.name: setting for setting in settings_of(cls)}
    flags = _parse_flags(settings.values(), argv, description)
    _refuse_unknown_variables(environ, KNOWN_VARIABLES | {setting.variable for setting in settings.values()})
    values = {name: _value(setting, flags, environ) for name, setting in settings.items()}
    return _build(cls, {name: value for name, value in values.items() if value is not dataclasses.MISSING})


def settings_of(cls: type) -> Iterator[Setting]:
    """The leaf fields of a settings class, depth first. A name used twice is our bug."""
    seen: set[str] = set()
    for setting in _leaves(cls):
        assert setting.field.name not in seen, f"{cls.__name__} has two settings called {setting.field.name}"
        seen.add(setting.field.name)
        yield setting


def _leaves(cls: type) -> Iterator[Setting]:
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _leaves(kind)  # type: ignore[arg-type]
        else:
            yield Setting(cls, field, kind)


def _parse_flags(settings: Any, argv: Sequence[str], description: str) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for setting in settings:
        text = f"{setting.field.metadata.get('help', '')} ({setting.legal}; {_default_text(setting)}; {setting.variable})"
        if setting.kind is bool:
            group = parser.add_mutually_exclusive_group()
            group.add_argument(
                setting.flag, action="store_const", const="true", dest=setting.field.name, help=text.replace("%", "%%")
            )
            group.add_argument("--no-" + setting.flag[2:], action="store_const", const="false", dest=setting.field.name)
        else:
            parser.add_argument(setting.flag, dest=setting.field.name, metavar="VALUE", help=text.replace("%", "%%"))
    return vars(parser.parse_args(argv))


def _default_text(setting: Setting) -> str:
    if setting.required:
        return "required"
    factory = setting.field.default_factory
    return f"default: {setting.field.default if factory is dataclasses.MISSING else factory()}"


def _refuse_unknown_variables(environ: Mapping[str, str], known: frozenset[str]) -> None:
    for key in sorted(environ):
        if key.startswith(PREFIX) and key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "no variable has a name like it."
            _exit(f"{key}={environ[key]!r}: unknown variable; {hint} Legal: {', '.join(sorted(known))}")


def _value(setting: Setting, flags: Mapping[str, str], environ: Mapping[str, str]) -> Any:
    key, text = setting.flag, flags.get(setting.field.name)
    if text is None:
        key, text = setting.variable, environ.get(setting.variable) or None
    if text is None:
        return _required_missing(setting) if setting.required else dataclasses.MISSING
    try:
        return setting.convert(text)
    except MalformedValueError:
        _exit(f"{key}: {text!r} is not legal; it takes {setting.legal}")


def _required_missing(setting: Setting) -> NoReturn:
    _exit(f"{setting.flag} (or {setting.variable}) is required; it takes {setting.legal}")


def _build(cls: type[T], values: Mapping[str, Any]) -> T:
    kinds = get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if dataclasses.is_dataclass(kinds[field.name]):
            arguments[field.name] = _build(kinds[field.name], values)
        elif field.name in values:
            arguments[field.name] = values[field.name]
    try:
        return cls(**arguments)
    except ValueError as error:
        _exit(str(error))


def _exit(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _converter(kind: Any) -> Convert:
    inner = _optional_of(kind)
    if inner is not None:
        return lambda text: None if text.lower() == "none" else _converter(inner)(text)
    if get_origin(kind) is Literal:
        return lambda text: _choice(text, get_args(kind))
    if get_origin(kind) is tuple:
        convert = _converter(get_args(kind)[0])
        return lambda text: tuple(convert(part.strip()) for part in text.split(",") if part.strip())
    return _CONVERTERS[kind]


def _optional_of(kind: Any) -> Any | None:
    """X for `X | None`, else None."""
    if get_origin(kind) not in (Union, types.UnionType):
        return None
    return next(argument for argument in get_args(kind) if argument is not type(None))


def _choice(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    raise MalformedValueError


def _bool(text: str) -> bool:
    value = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}.get(
        text.lower()
    )
    if value is None:
        raise MalformedValueError
    return value


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise MalformedValueError from error


def _float(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise MalformedValueError from error
    if not math.isfinite(value):
        raise MalformedValueError
    return value


_CONVERTERS: dict[Any, Convert] = {bool: _bool, int: _int, float: _float, str: str, Path: lambda text: Path(text).expanduser()}
_NAMES: dict[Any, str] = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path"}


def _legal(kind: Any) -> str:
    inner = _optional_of(kind)
    if inner is not None:
        return _legal(inner) + " or none"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a comma-separated list; each {_legal(get_args(kind)[0])}"
    return _NAMES[kind]


def _range_text(metadata: Mapping[str, Any]) -> str:
    parts = [f"{word} {metadata[key]}" for word, key in (("at least", "minimum"), ("at most", "maximum")) if key in metadata]
    return " " + " and ".join(parts) if parts else ""


def _check_range(value: Any, metadata: Mapping[str, Any]) -> None:
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if number is not None and not metadata.get("minimum", number) <= number <= metadata.get("maximum", number):
            raise MalformedValueError
