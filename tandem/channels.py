"""The one way to open a channel, and what a call carries along."""

import grpc
import grpc.aio
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

# A hung peer is noticed after keepalive plus ping timeout: 2 s on links between our own processes.
CLIENT_KEEPALIVE_S = 10.0
INTERNAL_KEEPALIVE_S = 1.0
INTERNAL_PING_TIMEOUT_S = 1.0
# Pauses between attempts to connect. Within the suite they are most of the time in which a worker that serves is not yet used.
RECONNECT_S = 1.0
INTERNAL_RECONNECT_S = 0.2
PING_TIMEOUT_S = 2.0

DEFAULT_RECEIVE_BYTES = 4 * 1024 * 1024

_propagator = TraceContextTextMapPropagator()


def open_channel(
    address: str,
    *,
    keepalive_s: float = CLIENT_KEEPALIVE_S,
    ping_timeout_s: float = PING_TIMEOUT_S,
    max_receive_bytes: int = DEFAULT_RECEIVE_BYTES,
    reconnect_s: float = RECONNECT_S,
) -> grpc.aio.Channel:
    """A plaintext channel with a connection of its own; the caller closes it. Calls on it are never retried by gRPC."""
    options = channel_options(keepalive_s, ping_timeout_s, max_receive_bytes, reconnect_s)
    return grpc.aio.insecure_channel(address, options=options)


def open_internal_channel(address: str, *, max_receive_bytes: int = DEFAULT_RECEIVE_BYTES) -> grpc.aio.Channel:
    """A channel between processes of the suite: a frozen peer is noticed within 2 s."""
    return open_channel(
        address,
        keepalive_s=INTERNAL_KEEPALIVE_S,
        ping_timeout_s=INTERNAL_PING_TIMEOUT_S,
        max_receive_bytes=max_receive_bytes,
        reconnect_s=INTERNAL_RECONNECT_S,
    )


def channel_options(
    keepalive_s: float, ping_timeout_s: float, max_receive_bytes: int, reconnect_s: float = RECONNECT_S
) -> tuple[tuple[str, int], ...]:
    """gRPC's channel arguments. Keepalive without `ping_timeout_ms` does not notice a frozen peer (gRPC keepalive guide)."""
    return (
        ("grpc.keepalive_time_ms", round(keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(ping_timeout_s * 1000)),
        ("grpc.http2.ping_timeout_ms", round(ping_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # gRPC waits up to two minutes between attempts to connect; a healed link must serve again within 5 s.
        # gRPC spreads the pauses by a fifth, so that not all come back at once.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", round(reconnect_s * 1000)),
        # Retry and resume are decided in one place, the gateway's relay.
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.max_receive_message_length", max_receive_bytes),
    )


def call_metadata() -> tuple[tuple[str, str], ...]:
    """The W3C trace context of the current span, as metadata for a call; empty outside a span."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return tuple(carrier.items())
