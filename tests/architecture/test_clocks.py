"""Leases, deadlines and all other spans of time are measured on monotonic clocks: wall clocks jump."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tandem", "llm", "gateway", "prefill_svc", "decode_svc", "kvtransfer")
WALL_CLOCKS = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}
# Ids, spans and dates for people.
ALLOWED = {"gateway/request_id.py", "gateway/templates.py", "tandem/clock.py"}


def reads_wall_clock(path: Path) -> bool:
    """Also where it is only passed on, and imported by its own name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in WALL_CLOCKS:
            return True
        if isinstance(node, ast.ImportFrom) and any((node.module, alias.name) in WALL_CLOCKS for alias in node.names):
            return True
    return False


def test_c4_only_what_is_for_people_reads_the_wall_clock() -> None:
    paths = [
        path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    ]
    assert {str(path.relative_to(ROOT)) for path in paths if reads_wall_clock(path)} == ALLOWED
