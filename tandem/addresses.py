"""Where a process can be reached."""

import socket

_WILDCARDS = ("0.0.0.0", "::", "[::]")


def free_port(host: str) -> int:
    """A port that nobody listens on right now."""
    with listen(host, 0) as listener:
        return int(listener.getsockname()[1])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, on either kind of address; OSError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), port), family=family)


def target(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address, whose last part would else be read as a port."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def advertised_host(bound_host: str, configured: str = "") -> str:
    """The host by which others reach a process bound to `bound_host`: as configured, or that host, or, if it is bound to every
    interface, the address that this machine's own name resolves to."""
    if configured:
        return configured
    return socket.gethostbyname(socket.gethostname()) if bound_host in _WILDCARDS else bound_host
