"""Looking up names."""

import pytest

from gateway.targets import Target, look_up


@pytest.mark.parametrize("host", ["no-such-host.invalid", "two..dots", "x" * 64 + ".invalid", "\ud800"])
async def test_a_name_that_cannot_be_looked_up_has_no_addresses(host: str) -> None:
    assert await look_up(Target(host, 1, by_name=True)) == ()


async def test_an_address_is_its_own_name() -> None:
    assert await look_up(Target("127.0.0.1", 7, by_name=True)) == ["127.0.0.1:7"]
