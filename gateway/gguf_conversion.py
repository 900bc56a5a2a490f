"""Puts the tokenizer inside a GGUF file into a directory of the cache, as Hugging Face directories have it: once for each model.

`python -m gateway.gguf_conversion GGUF DIRECTORY` does the work, in a process of its own: the gguf library takes some 200 MB, which
a gateway would keep for as long as it lives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tandem.models import ModelError

# Counts changes of what is written.
_VERSION = 1


def converted_directory(gguf: Path, digest: str, cache: Path) -> Path:
    """The directory with the converted tokenizer of `gguf`, whose `digest` names it below `cache`; made if it is missing.

    Blocks, the first time for seconds. Raises ModelError if the file's tokenizer is not supported or the cache cannot be written.
    """
    directory = cache / "tokenizers" / f"{digest.replace(':', '-')}-v{_VERSION}"
    if not (directory / "config.json").is_file():
        _convert_in_child(gguf, directory)
    return directory


def _convert_in_child(gguf: Path, directory: Path) -> None:
    command = (sys.executable, "-m", "gateway.gguf_conversion", str(gguf), str(directory))
    # Its input is not ours: a supervised gateway watches its own for the parent's end.
    child = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if child.returncode:
        said = child.stderr.decode(errors="replace").splitlines() or [f"it ended with status {child.returncode}"]
        raise ModelError(f"the tokenizer of {gguf} cannot be converted: {said[-1]}")


def convert(gguf: Path, directory: Path) -> None:
    """The child's work. Raises ModelError."""
    from gateway.gguf_metadata import read_gguf_metadata
    from gateway.gguf_tokenizer import tokenizer_files

    files = tokenizer_files(read_gguf_metadata(gguf))
    try:
        _publish(files, directory)
    except OSError as error:
        raise ModelError(f"it cannot be kept in {directory}: {error}") from error


def _publish(files: Mapping[str, str], directory: Path) -> None:
    """All files appear at once; of two processes that write at the same time one wins."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=directory.parent))
    try:
        for name, content in files.items():
            (draft / name).write_text(content, encoding="utf-8")
        os.rename(draft, directory)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not (directory / "config.json").is_file():
            raise


def main() -> None:
    gguf, directory = map(Path, sys.argv[1:])
    try:
        convert(gguf, directory)
    except ModelError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
