"""The processes that `tandem up` starts."""

import sys

import pytest

from tandem.cli.placement import Placement, Seat
from tandem.cli.plan import SuitePlan, plan_members


def flags(command: tuple[str, ...]) -> dict[str, str]:
    """Flag to value; a flag without value maps to itself."""
    pairs = zip(command[3:], (*command[4:], "--"), strict=True)
    return {flag: flag if value.startswith("--") else value for flag, value in pairs if flag.startswith("--")}


def test_two_workers_and_a_gateway() -> None:
    gateway, prefill, decode = plan_members(SuitePlan("random:tiny"))
    assert [member.spec.command[:3] for member in (gateway, prefill, decode)] == [
        (sys.executable, "-m", name) for name in ("gateway", "prefill_svc", "decode_svc")
    ]
    told = flags(gateway.spec.command)
    assert (told["--prefill-targets"], told["--decode-targets"]) == (prefill.address, decode.address)
    assert all("--exit-with-parent" in flags(member.spec.command) for member in (gateway, prefill, decode))


def test_targets_are_listed_and_all_ports_differ() -> None:
    members = plan_members(SuitePlan("random:tiny", Placement((Seat(),) * 3, (Seat(),) * 5)))
    assert len({member.address for member in members}) == 9
    assert flags(members[0].spec.command)["--decode-targets"].split(",") == [member.address for member in members[4:]]
    assert [member.spec.name for member in members[1:5]] == ["prefill-0", "prefill-1", "prefill-2", "decode-0"]


def test_unset_options_are_left_to_the_environment() -> None:
    assert (
        not {"--dtype", "--kv-dtype", "--weights", "--threads", "--device", "--gpu-memory-fraction"}
        & flags(plan_members(SuitePlan("m"))[1].spec.command).keys()
    )
    told = flags(plan_members(SuitePlan("m", dtype="float32", threads=2))[2].spec.command)
    assert (told["--dtype"], told["--threads"], told["--model"]) == ("float32", "2", "m")


def test_each_role_is_told_its_weights() -> None:
    _, prefill, decode = plan_members(SuitePlan("m", prefill_weights="int8"))
    assert flags(prefill.spec.command)["--weights"] == "int8"
    assert "--weights" not in flags(decode.spec.command)


def test_both_roles_are_told_the_same_kind_of_kv() -> None:
    _, prefill, decode = plan_members(SuitePlan("m", kv_dtype="int8"))
    assert [flags(member.spec.command)["--kv-dtype"] for member in (prefill, decode)] == ["int8", "int8"]


def test_each_worker_is_told_its_device_and_its_share() -> None:
    _, prefill, decode = plan_members(SuitePlan("m", Placement((Seat("cuda:1"),), (Seat("cuda:0", 0.45),))))
    assert flags(prefill.spec.command)["--device"] == "cuda:1"
    assert "--gpu-memory-fraction" not in flags(prefill.spec.command)
    told = flags(decode.spec.command)
    assert (told["--device"], told["--gpu-memory-fraction"]) == ("cuda:0", "0.45")


def test_gateway_stops_first_and_prefill_last() -> None:
    members = plan_members(SuitePlan("m"))
    assert [member.spec.stop_order for member in members] == [0, 2, 1]


def test_a_gateway_on_every_interface_is_reached_by_loopback() -> None:
    assert SuitePlan("m", host="0.0.0.0", port=7).address == "127.0.0.1:7"
    assert SuitePlan("m", host="10.0.0.1", port=7).address == "10.0.0.1:7"


@pytest.mark.parametrize(
    ("host", "address"),
    [("::1", "[::1]:50051"), ("[::1]", "[::1]:50051"), ("::", "127.0.0.1:50051"), ("0.0.0.0", "127.0.0.1:50051"), ("h", "h:50051")],
)
def test_the_gateway_is_reached_where_it_listens(host: str, address: str) -> None:
    assert SuitePlan("m", host=host).address == address
