"""The command `tandem`. Nothing slow is imported until a command needs it."""


def main() -> None:
    """The entry point."""
    from tandem.cli.app import app

    app(prog_name="tandem")
