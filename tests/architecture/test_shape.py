"""Sizes that keep code readable: modules, functions, parameters. Kernels and generated code are exempt."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("tandem", "llm", "gateway", "prefill_svc", "decode_svc", "kvtransfer", "bench")
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 300, 60


def sources() -> list[Path]:
    found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(path for path in found if "_pb2" not in path.name)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_and_its_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    if "kernels" in path.parts:
        return
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or node.lineno) - node.lineno >= MAX_FUNCTION_LINES] == []
