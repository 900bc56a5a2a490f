"""Finds this machine's GPUs for `tandem up` and seats the workers."""

from __future__ import annotations

import os
from dataclasses import replace

from tandem.cli.client import exit_on_error
from tandem.cli.devices import has_gpu_driver, torch_report
from tandem.cli.placement import Placement, PlacementError, Seat, Wish, parse_wish, place
from tandem.cli.terminal import CommandError


def find_seats(prefill: str, decode: str) -> Placement:
    """Ends the program with advice where the wishes cannot be met. TANDEM_DEVICE, if set, is left to the workers."""
    with exit_on_error():
        try:
            return _seat(parse_wish(prefill), parse_wish(decode))
        except PlacementError as error:
            raise CommandError(f"--prefill, --decode: {error}.", "`tandem doctor` shows the devices.") from error


def _seat(prefill: Wish, decode: Wish) -> Placement:
    if os.environ.get("TANDEM_DEVICE") and not prefill.devices and not decode.devices:
        return _left_to_variables(prefill, decode)
    num_gpus, why = _count_gpus()
    try:
        placement = place(prefill, decode, num_gpus)
    except PlacementError as error:
        raise PlacementError("; ".join(filter(None, (str(error), why)))) from error
    return replace(placement, reason=why or placement.reason)


def _left_to_variables(prefill: Wish, decode: Wish) -> Placement:
    return Placement((Seat(),) * prefill.count, (Seat(),) * decode.count)


def _count_gpus() -> tuple[int, str]:
    """Usable GPUs, and why there are none where one might expect some."""
    if not has_gpu_driver():
        return 0, ""
    report = torch_report()
    if report.error:
        return 0, f"torch could not be asked for GPUs: {report.error}"
    if report.gpus and report.missing:
        return 0, f"there are GPUs, but {' and '.join(report.missing)} not installed: pip install 'tandem-serve[cuda]'"
    if not report.gpus and not report.cuda_version:
        return 0, "there is a GPU driver, but this torch is built for CPUs only"
    return len(report.gpus), ""
