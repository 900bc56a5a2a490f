"""`python -m gateway`: the suite's front, which clients call."""

import os
import sys

from gateway.app import serve
from gateway.settings import GatewaySettings
from tandem.config import load_settings
from tandem.logs import configure_logging
from tandem.parent_watch import leave_at_once, watch_parent
from tandem.server import run
from tandem.tracing import configure_tracing


def main() -> None:
    settings = load_settings(GatewaySettings, sys.argv[1:], os.environ, "The Tandem gateway: takes requests and places them.")
    configure_logging("gateway")
    configure_tracing("tandem.gateway")
    if settings.server.exit_with_parent:
        watch_parent(leave_at_once)  # while the model loads; the server takes over when it starts
    run(serve(settings))


if __name__ == "__main__":
    main()
