"""Addresses as gRPC takes them."""

import socket

import pytest

from tandem.addresses import advertised_host, free_port, target


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", "127.0.0.1:50051"), ("::1", "[::1]:50051"), ("[::1]", "[::1]:50051"), ("worker", "worker:50051")],
)
def test_an_ipv6_host_gets_brackets(host: str, expected: str) -> None:
    assert target(host, 50051) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]"])
def test_a_free_port_is_found_on_either_kind_of_address(host: str) -> None:
    if "::1" in host and not _has_ipv6():
        pytest.skip("no IPv6 here")
    assert 0 < free_port(host) < 65536


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_a_configured_host_wins_and_a_bound_one_is_itself() -> None:
    assert advertised_host("0.0.0.0", "worker") == "worker"
    assert advertised_host("::1") == "::1"
