"""`python -m prefill_svc`: a prefill worker."""

import os
import sys

from prefill_svc.settings import PrefillSettings
from tandem.compute import prepare_compute
from tandem.config import load_settings
from tandem.logs import configure_logging
from tandem.parent_watch import leave_at_once, watch_parent
from tandem.pauses import without_collection
from tandem.server import run
from tandem.tracing import configure_tracing


def main() -> None:
    settings = load_settings(PrefillSettings, sys.argv[1:], os.environ, "A Tandem prefill worker: computes prompts.")
    configure_logging("prefill")
    configure_tracing("tandem.prefill")
    if settings.server.exit_with_parent:
        watch_parent(leave_at_once)  # while the model loads; the server takes over when it starts
    prepare_compute(settings.weights)
    with without_collection():
        from prefill_svc.worker import serve  # torch reads its environment when imported

    run(serve(settings))


if __name__ == "__main__":
    main()
