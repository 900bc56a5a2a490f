"""Digests that sample: equal for equal bytes, different for different ones, quick for large files."""

from pathlib import Path

import pytest

from tandem.fingerprints import fingerprint_files, fingerprint_value, sha256_file

LARGE = 4 << 20


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_same_bytes_elsewhere_have_the_same_fingerprint(tmp_path: Path) -> None:
    content = bytes(range(256)) * (LARGE // 256)
    first, second = write(tmp_path / "a.gguf", content), write(tmp_path / "b.gguf", content)
    assert fingerprint_files([first], named=False) == fingerprint_files([second], named=False)
    assert fingerprint_files([first], named=True) != fingerprint_files([second], named=True)


@pytest.mark.parametrize("offset", [0, 60_000, LARGE - 1])
def test_a_change_at_either_end_is_seen(tmp_path: Path, offset: int) -> None:
    content = bytearray(LARGE)
    before = fingerprint_files([write(tmp_path / "x", bytes(content))], named=False)
    content[offset] ^= 1
    assert fingerprint_files([write(tmp_path / "x", bytes(content))], named=False) != before


def test_other_weights_of_the_same_size_are_seen(tmp_path: Path) -> None:
    head, tail = bytes(1 << 17), bytes(1 << 17)
    digests = {fingerprint_files([write(tmp_path / "x", head + bytes([fill]) * LARGE + tail)], named=False) for fill in range(3)}
    assert len(digests) == 3


def test_length_is_part_of_it(tmp_path: Path) -> None:
    assert (
        len({fingerprint_files([write(tmp_path / "x", bytes(size))], named=False) for size in (0, 1, 1000, LARGE, LARGE + 1)}) == 5
    )


def test_files_do_not_run_into_each_other(tmp_path: Path) -> None:
    split = [
        [write(tmp_path / "a", b"xy"), write(tmp_path / "b", b"z")],
        [write(tmp_path / "c", b"x"), write(tmp_path / "d", b"yz")],
    ]
    assert len({fingerprint_files(paths, named=False) for paths in split}) == 2


def test_values_are_kept_apart_by_label_and_not_by_order() -> None:
    assert fingerprint_value("a", {"x": 1, "y": 2}) == fingerprint_value("a", {"y": 2, "x": 1})
    assert len({fingerprint_value("a", "x"), fingerprint_value("b", "x"), fingerprint_value("a", "y")}) == 3


def test_sha256_is_the_real_one(tmp_path: Path) -> None:
    assert sha256_file(write(tmp_path / "x", b"abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
