"""How measured programs are asked for: `python -m bench.NAME --help` shows what each option does, and what is taken without it."""

import argparse
from pathlib import Path


class _Formatter(argparse.HelpFormatter):
    """Shows defaults that are values; flags and what is left out say enough by themselves."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default if isinstance(action.default, list) else [action.default]
        shown = " ".join(str(item) for item in default if item != "" and isinstance(item, int | float | str | Path))
        if isinstance(action.default, bool) or not shown or shown == argparse.SUPPRESS:
            return action.help
        return f"{action.help or ''} (default: {shown})".strip()


def new_parser(name: str, description: str) -> argparse.ArgumentParser:
    """For `python -m bench.NAME`."""
    return argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description, formatter_class=_Formatter)
