"""`python -m tandem.probe ADDRESS [SERVICE]`: exits with 0 if the gRPC health service there says SERVING. For container checks."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def probe(address: str, service: str = "", timeout_s: float = 3.0) -> str:
    """The health status by name, or the reason why there is none."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"no answer from {address}: {error.code().name}"
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


if __name__ == "__main__":
    status = probe(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "")
    print(status)
    raise SystemExit(status != "SERVING")
