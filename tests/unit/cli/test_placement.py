"""Which worker computes on which device."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.cli import seats
from tandem.cli.devices import TorchReport, has_gpu_driver
from tandem.cli.placement import PlacementError, Seat, Wish, parse_wish, place

H200 = TorchReport(version="2.11", cuda_version="13.0", gpus=("NVIDIA H200", "NVIDIA H200"))


def devices(prefill: str, decode: str, num_gpus: int) -> tuple[list[str | None], list[str | None]]:
    placement = place(parse_wish(prefill), parse_wish(decode), num_gpus)
    return [seat.device for seat in placement.prefill], [seat.device for seat in placement.decode]


@pytest.mark.parametrize(
    ("prefill", "decode", "num_gpus", "expected"),
    [
        ("1", "1", 0, (["cpu"], ["cpu"])),
        ("1", "1", 1, (["cuda:0"], ["cuda:0"])),
        ("1", "1", 2, (["cuda:0"], ["cuda:1"])),
        ("1", "1", 8, (["cuda:0"], ["cuda:1"])),
        ("1", "3", 4, (["cuda:0"], ["cuda:1", "cuda:2", "cuda:3"])),
        ("2", "2", 2, (["cuda:0", "cuda:0"], ["cuda:1", "cuda:1"])),
        ("3", "1", 2, (["cuda:0", "cuda:0", "cuda:0"], ["cuda:1"])),
        ("1", "7", 4, (["cuda:0"], [f"cuda:{1 + number % 3}" for number in range(7)])),
        ("cuda:1", "cuda:0", 2, (["cuda:1"], ["cuda:0"])),
        ("cuda:0, cuda:1", "1", 2, (["cuda:0", "cuda:1"], ["cuda:0"])),
        ("cuda:2", "2", 4, (["cuda:2"], ["cuda:0", "cuda:1"])),
        ("1", "cuda:0", 2, (["cuda:1"], ["cuda:0"])),
        ("cpu", "1", 1, (["cpu"], ["cuda:0"])),
        ("cpu", "cpu", 2, (["cpu"], ["cpu"])),
    ],
)
def test_devices(prefill: str, decode: str, num_gpus: int, expected: tuple[list[str], list[str]]) -> None:
    assert devices(prefill, decode, num_gpus) == expected


def test_workers_on_one_gpu_divide_its_memory_and_it_is_said() -> None:
    placement = place(Wish(1), Wish(2), 1)
    assert {seat.memory_fraction for seat in (*placement.prefill, *placement.decode)} == {0.3}
    assert placement.reason == "1 GPU found; 3 workers share cuda:0 and its memory"
    assert place(Wish(1), Wish(1), 2).decode == (Seat("cuda:1"),)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 16))
def test_every_worker_gets_a_seat_and_no_gpu_is_promised_twice(num_prefill: int, num_decode: int, num_gpus: int) -> None:
    placement = place(Wish(num_prefill), Wish(num_decode), num_gpus)
    assert (len(placement.prefill), len(placement.decode)) == (num_prefill, num_decode)
    promised: dict[str | None, float] = {}
    for seat in (*placement.prefill, *placement.decode):
        promised[seat.device] = promised.get(seat.device, 0.0) + (seat.memory_fraction or 0.9)
    if num_gpus:
        assert len(promised) == min(num_gpus, num_prefill + num_decode)
        assert max(promised.values()) < 0.95
    if num_gpus > 1:
        assert not {seat.device for seat in placement.prefill} & {seat.device for seat in placement.decode}


@pytest.mark.parametrize("text", ["0", "65", "", "gpu", "cuda", "cuda:x", "cuda:0,,cuda:1", "-1", "1.5"])
def test_wishes_that_make_no_sense(text: str) -> None:
    with pytest.raises(PlacementError):
        parse_wish(text)


def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(PlacementError, match="there is no cuda:2: this machine has 2 GPUs"):
        place(Wish(1, ("cuda:2",)), Wish(1), 2)


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_gpu_driver([tmp_path / "absent"])
    monkeypatch.setattr(seats, "has_gpu_driver", lambda: False)
    monkeypatch.setattr(seats, "torch_report", lambda: pytest.fail("takes seconds"))
    assert seats.find_seats("1", "1").prefill == (Seat("cpu"),)


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (H200, "2 GPUs found"),
        (TorchReport(version="2.11", cuda_version="13.0", gpus=("H200",), missing=("cupy",)), "cupy not installed"),
        (TorchReport(version="2.13.0+cpu"), "built for CPUs only"),
        (TorchReport(error="no torch"), "could not be asked for GPUs: no torch"),
    ],
)
def test_the_reason_tells_what_was_found(monkeypatch: pytest.MonkeyPatch, report: TorchReport, reason: str) -> None:
    monkeypatch.setattr(seats, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(seats, "torch_report", lambda: report)
    placement = seats.find_seats("1", "1")
    assert reason in placement.reason
    assert placement.decode == (Seat("cuda:1" if report is H200 else "cpu"),)


def test_variables_are_left_to_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_DEVICE", "cpu")
    assert seats.find_seats("2", "1").prefill == (Seat(), Seat())


def test_impossible_wishes_end_with_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(seats, "has_gpu_driver", lambda: True)
    monkeypatch.setattr(seats, "torch_report", lambda: TorchReport(version="2.13.0+cpu"))
    with pytest.raises(SystemExit):
        seats.find_seats("cuda:0", "1")
    said = capsys.readouterr().err
    assert "no cuda:0" in said and "built for CPUs only" in said
