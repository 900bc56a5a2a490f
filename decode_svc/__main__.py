"""`python -m decode_svc`: a decode worker."""

import os
import sys

from decode_svc.settings import DecodeSettings
from tandem.compute import prepare_compute
from tandem.config import load_settings
from tandem.logs import configure_logging
from tandem.parent_watch import leave_at_once, watch_parent
from tandem.pauses import without_collection
from tandem.server import run
from tandem.tracing import configure_tracing


def main() -> None:
    settings = load_settings(DecodeSettings, sys.argv[1:], os.environ, "A Tandem decode worker: generates tokens.")
    configure_logging("decode")
    configure_tracing("tandem.decode")
    if settings.server.exit_with_parent:
        watch_parent(leave_at_once)  # while the model loads; the server takes over when it starts
    prepare_compute(settings.weights)
    with without_collection():
        from decode_svc.worker import serve  # torch reads its environment when imported

    run(serve(settings))


if __name__ == "__main__":
    main()
