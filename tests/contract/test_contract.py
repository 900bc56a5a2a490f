"""The contract: stubs are fresh, buf is content, and what is on the wire is what was agreed on."""

import filecmp
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.api.v1 import generation_pb2, model_pb2, operations_pb2, tokenizer_pb2
from tandem.worker.v1 import decode_pb2, kv_pb2, prefill_pb2, status_pb2

FILES = (generation_pb2, model_pb2, operations_pb2, tokenizer_pb2, decode_pb2, kv_pb2, prefill_pb2, status_pb2)
GOLDEN = Path(__file__).with_name("descriptors.txt")


def test_committed_stubs_are_what_the_protos_generate(repository, tmp_path):
    subprocess.run([sys.executable, "protos/generate.py", str(tmp_path)], cwd=repository, check=True, timeout=100)
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    committed = sorted(
        path.relative_to(repository) for path in (repository / "tandem").rglob("*_pb2*") if path.suffix in (".py", ".pyi")
    )
    assert generated == committed
    _, different, unreadable = filecmp.cmpfiles(tmp_path, repository, [str(path) for path in generated], shallow=False)
    assert (different, unreadable) == ([], []), "run `python protos/generate.py`"


def test_every_proto_file_is_in_the_golden_listing(repository):
    protos = {str(path.relative_to(repository / "protos")) for path in (repository / "protos").rglob("*.proto")}
    assert protos == {module.DESCRIPTOR.name for module in FILES}


def test_buf_lint_passes(repository):
    buf = Path(sys.executable).with_name("buf")
    if not buf.exists():
        pytest.fail("buf is missing; install the dev extra")
    done = subprocess.run([str(buf), "lint"], cwd=repository / "protos", capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wire_matches_the_golden_listing():
    """A field renumbered, retyped or renamed breaks running peers.

    After an intended addition write the listing anew: `python tests/contract/test_contract.py`.
    """
    assert listing() == GOLDEN.read_text(encoding="utf-8"), "the wire has changed; see this test's docstring"


def listing() -> str:
    """One line per service method, message field and enum value, in the files' order."""
    return "\n".join(line for module in FILES for line in _file_lines(module.DESCRIPTOR)) + "\n"


def _file_lines(file) -> Iterator[str]:
    yield f"file {file.name} package {file.package}"
    for service in file.services_by_name.values():
        yield from (_method_line(method) for method in service.methods)
    for message in file.message_types_by_name.values():
        yield from _message_lines(message)
    for enum in file.enum_types_by_name.values():
        yield from (f"enum {enum.full_name} {value.name} = {value.number}" for value in enum.values)


def _method_line(method) -> str:
    sent = "stream " * method.client_streaming + method.input_type.full_name
    returned = "stream " * method.server_streaming + method.output_type.full_name
    return f"rpc {method.full_name} ({sent}) returns ({returned})"


def _message_lines(message) -> Iterator[str]:
    yield f"message {message.full_name}"
    yield from (_field_line(field) for field in sorted(message.fields, key=lambda field: field.number))
    for nested in message.nested_types:
        yield from _message_lines(nested)


def _field_line(field) -> str:
    kind = field.message_type or field.enum_type
    label = "repeated " if field.is_repeated else "optional " if _is_optional(field) else ""
    oneof = f" in {field.containing_oneof.name}" if field.containing_oneof and not _is_optional(field) else ""
    return f"field {field.full_name} = {field.number} {label}{kind.full_name if kind else _TYPES[field.type]}{oneof}"


def _is_optional(field) -> bool:
    """Whether the field says `optional`, which proto3 keeps as a oneof of its own whose name begins with an underscore."""
    return field.containing_oneof is not None and field.containing_oneof.name.startswith("_")


_TYPES = {
    1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 6: "fixed64", 7: "fixed32", 8: "bool", 9: "string",
    12: "bytes", 13: "uint32", 15: "sfixed32", 16: "sfixed64", 17: "sint32", 18: "sint64",
}  # fmt: skip

if __name__ == "__main__":
    GOLDEN.write_text(listing(), encoding="utf-8")
