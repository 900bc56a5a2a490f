"""The import rules, read from the syntax trees; and, for the two that cost memory or time, from what a fresh process loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tandem", "llm", "gateway", "prefill_svc", "decode_svc", "kvtransfer", "bench")

# What each package may import of ours, beside itself.
ALLOWED = {
    "tandem": (),
    "llm": (),
    "kvtransfer": ("tandem", "llm.kv"),
    "gateway": ("tandem",),
    "prefill_svc": ("tandem", "llm", "kvtransfer"),
    "decode_svc": ("tandem", "llm", "kvtransfer"),
    "bench": PACKAGES,
}

# Policy: no tensors, no gRPC, so that it is tested in milliseconds.
POLICY = (
    "prefill_svc.batcher",
    "decode_svc.batcher",
    "gateway.routing",
    "gateway.capacity",
    "gateway.admission",
    "gateway.drain_rate",
    "gateway.fair_queue",
    "gateway.failover",
    "gateway.quarantine",
    "gateway.ejection",
    "gateway.isolation",
    "gateway.losses",
    "gateway.links",
    "llm.kv.layout",
    "llm.kv.allocator",
    "llm.sampling_params",
    "kvtransfer.ledger",
    "kvtransfer.ticket",
)

# Where messages of the wire become plain values and back.
EDGES = {
    "app",
    "attempt",
    "control",
    "fleet",
    "followers",
    "model_service",
    "operations_service",
    "puller",
    "service",
    "validate",
    "wire",
    "worker",
    "workers",
}
EDGES_OF_TANDEM = {"status", "tracing", "sampled"}


@dataclass(frozen=True)
class Import:
    """One imported module; `lazy` if only a function's run imports it. Imports for type checkers are not listed."""

    module: str
    lazy: bool


def modules() -> dict[str, Path]:
    """Every module of ours by dotted name, generated ones included."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
WRITTEN = sorted(name for name in MODULES if "_pb2" not in name)


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return tuple(_walk(tree, module, lazy=False))


def _walk(node: ast.AST, module: str, *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from (Import(name, inside) for name in _names(child, module))
        yield from _walk(child, module, lazy=inside)


def _names(node: ast.AST, module: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute(node, module)
        return [base, *(name for alias in node.names if (name := f"{base}.{alias.name}") in MODULES)]
    return []


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    is_package = MODULES[module].name == "__init__.py"
    parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def reachable(start: str, *, lazy: bool) -> set[str]:
    """All modules, ours and others', that importing `start` brings; with `lazy` also what its functions may import later."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        waiting.extend(parent for parent in _parents(module) if parent in MODULES)
        if module in MODULES:
            waiting.extend(each.module for each in imports_of(module) if lazy or not each.lazy)
    return seen


def _parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts)))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def of_ours(module: str) -> bool:
    return module.partition(".")[0] in PACKAGES


@pytest.mark.parametrize("module", WRITTEN)
def test_packages_import_only_what_they_may(module):
    package = module.split(".")[0]
    allowed = (package, *ALLOWED[package])
    imported = {each.module for each in imports_of(module) if of_ours(each.module)}
    assert [name for name in sorted(imported) if not any(within(name, each) for each in allowed)] == []


@pytest.mark.parametrize("module", [name for name in WRITTEN if name.split(".")[0] in ("gateway", "tandem")])
def test_gateway_and_tandem_never_reach_torch(module):
    assert [name for name in sorted(reachable(module, lazy=True)) if within(name, "torch")] == []


@pytest.mark.parametrize("module", [name for name in WRITTEN if name.split(".")[0] == "llm"])
def test_llm_never_reaches_grpc(module):
    assert [name for name in sorted(reachable(module, lazy=True)) if within(name, "grpc")] == []


@pytest.mark.parametrize("module", [name for name in POLICY if name in MODULES])
def test_policy_loads_neither_torch_nor_grpc_nor_messages(module):
    direct = {each.module for each in imports_of(module)}
    heavy = [
        name for name in reachable(module, lazy=False) | direct if within(name, "torch") or within(name, "grpc") or "_pb2" in name
    ]
    assert sorted(heavy) == []


@pytest.mark.parametrize("module", WRITTEN)
def test_messages_are_imported_only_at_the_edges(module):
    imported = [each.module for each in imports_of(module) if "_pb2" in each.module and of_ours(each.module)]
    if imported:
        assert is_edge(module), f"{module} imports {imported}; let plain frozen values in"


def is_edge(module: str) -> bool:
    package, *_, last = module.split(".")
    if package == "tandem":
        return within(module, "tandem.cli") or last in EDGES_OF_TANDEM
    return package == "bench" or last in EDGES


def test_tests_never_import_bench_but_for_its_own():
    own = {path for kind in ("unit", "service") for path in (ROOT / "tests" / kind / "bench").rglob("*.py")}
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py") if path not in own}
    trees = {path: ast.parse(text) for path, text in sources.items()}
    importing = [
        str(path.relative_to(ROOT))
        for path, tree in trees.items()
        if any(
            isinstance(node, ast.Import | ast.ImportFrom) and "bench" in ast.unparse(node).split()[1].split(".")
            for node in ast.walk(tree)
        )
    ]
    assert importing == []


def test_no_module_is_a_drawer_for_everything():
    drawers = {"utils", "util", "common", "core", "helpers", "misc", "shared"}
    assert [name for name in MODULES if drawers & set(name.split("."))] == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        *((name, ("torch", "grpc", "numba")) for name in POLICY if name in MODULES),
        *((name, ("torch",)) for name in ("gateway.__main__",) if name in MODULES),
    ],
)
def test_a_fresh_process_confirms_it(module, unwanted):
    program = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
