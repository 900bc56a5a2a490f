"""Where workers are: fixed addresses, and names that are looked up again and again."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

DNS_PREFIX = "dns:///"
# A server that is there has spoken by then.
FIRST_WORD_S = 0.5


@dataclass(frozen=True)
class Target:
    """host:port of one worker, or, if `by_name`, of all workers behind a name."""

    host: str
    port: int
    by_name: bool = False

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


def parse_target(text: str) -> Target:
    """From "host:port" or "dns:///name:port". Raises ValueError."""
    host, separator, port = text.removeprefix(DNS_PREFIX).rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r} is neither host:port nor {DNS_PREFIX}name:port")
    return Target(host.strip("[]"), int(port), text.startswith(DNS_PREFIX))


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def look_up(target: Target) -> Sequence[str]:
    """The addresses behind a name, sorted; none if the name is unknown right now."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the latter for what cannot be a host's name
        return ()
    return sorted({join_address(str(address[0]), int(address[1])) for *_, address in found})


async def turns_away(address: str) -> bool:
    """Whether connections are refused there, or closed before a word, as a proxy does for a process that has ended.

    A gRPC server speaks first. What cannot be reached, or is silent, turns nobody away.
    """
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(FIRST_WORD_S):
            found = await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            return bool(found) and all([await _turned_away(family, place) for family, *_, place in found])
    except (OSError, UnicodeError, TimeoutError):
        return False


async def _turned_away(family: int, place: Any) -> bool:
    loop = asyncio.get_running_loop()
    with socket.socket(family, socket.SOCK_STREAM) as connecting:
        connecting.setblocking(False)
        try:
            await loop.sock_connect(connecting, place)
            return not await loop.sock_recv(connecting, 1)
        except ConnectionError:
            return True
