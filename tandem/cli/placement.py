"""Which worker gets which device. Pure policy: what there is to compute on is asked elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_DEVICE = re.compile(r"cpu|cuda:\d+")
_MEMORY_FRACTION = 0.9
"""Of a GPU, shared out among the workers on it."""
MAX_WORKERS = 64


class PlacementError(ValueError):
    """What was asked for makes no sense, or names devices that are not there; the message says what would."""


@dataclass(frozen=True)
class Seat:
    """A worker's device, and its share of the memory where it shares a GPU; None leaves it to variables and defaults."""

    device: str | None = None
    memory_fraction: float | None = None


@dataclass(frozen=True)
class Placement:
    """A seat for each worker, and the reason for people."""

    prefill: tuple[Seat, ...]
    decode: tuple[Seat, ...]
    reason: str = ""


@dataclass(frozen=True)
class Wish:
    """What was asked for a role: that many workers, or workers on these devices."""

    count: int
    devices: tuple[str, ...] = ()


def parse_wish(text: str) -> Wish:
    """ "2", or "cuda:0,cuda:1", or "cpu". Raises PlacementError."""
    parts = tuple(part.strip() for part in text.split(","))
    wish = Wish(int(text)) if text.strip().isdecimal() else Wish(len(parts), parts)
    if not all(_DEVICE.fullmatch(device) for device in wish.devices) or not 1 <= wish.count <= MAX_WORKERS:
        raise PlacementError(
            f"{text!r} is neither a number of workers, 1 to {MAX_WORKERS}, nor devices such as cuda:0,cuda:1 or cpu"
        )
    return wish


def place(prefill: Wish, decode: Wish, num_gpus: int) -> Placement:
    """Devices that were named are taken; the other role gets the GPUs that are left, or shares where none is.

    With GPUs enough every worker has one of its own, else prefill and decode divide them by their numbers of workers: neither then
    waits for the other's steps. Raises PlacementError for a GPU that is not there.
    """
    named = {*prefill.devices, *decode.devices}
    absent = sorted(device for device in named if device != "cpu" and int(device.partition(":")[2]) >= num_gpus)
    if absent:
        raise PlacementError(f"there is no {', '.join(absent)}: this machine has {num_gpus or 'no'} GPU{'s' * (num_gpus > 1)}")
    gpus = [f"cuda:{number}" for number in range(num_gpus)]
    free = [gpu for gpu in gpus if gpu not in named] or gpus or ["cpu"]
    reserved = _num_for_prefill(prefill, decode, len(free))
    prefill_devices = prefill.devices or _deal(prefill.count, free[:reserved])
    decode_devices = decode.devices or _deal(decode.count, free[reserved:] or free)
    users = Counter([*prefill_devices, *decode_devices])
    return Placement(_seats(prefill_devices, users), _seats(decode_devices, users), _reason(num_gpus, bool(named), users))


def _num_for_prefill(prefill: Wish, decode: Wish, num_free: int) -> int:
    if prefill.devices:
        return 0
    if decode.devices or num_free == 1:
        return num_free
    if prefill.count + decode.count <= num_free:
        return prefill.count
    return min(max(round(num_free * prefill.count / (prefill.count + decode.count)), 1), num_free - 1)


def _deal(count: int, devices: Sequence[str]) -> tuple[str, ...]:
    return tuple(devices[number % len(devices)] for number in range(count))


def _seats(devices: Sequence[str], users: Counter[str]) -> tuple[Seat, ...]:
    return tuple(Seat(device, _share(users[device]) if device != "cpu" else None) for device in devices)


def _share(users: int) -> float | None:
    return round(_MEMORY_FRACTION / users, 4) if users > 1 else None


def _reason(num_gpus: int, named: bool, users: Counter[str]) -> str:
    found = f"{num_gpus} GPU{'s' * (num_gpus > 1)} found" if num_gpus else "no GPU found"
    shared = [f"{count} workers share {device} and its memory" for device, count in users.items() if count > 1 and device != "cpu"]
    return "; ".join([found, *(["devices as told"] if named else []), *shared])
