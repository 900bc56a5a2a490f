"""What a person is told when a model cannot be loaded."""

import errno
import os

import pytest

from tandem.models import loading_failure


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_folder_and_how_to_take_another(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CACHE_DIR", "/full/disk")
    message = loading_failure(OSError(code, os.strerror(code)))
    assert os.strerror(code) in message and "/full/disk" in message and "TANDEM_CACHE_DIR" in message


def test_other_failures_say_what_the_system_says() -> None:
    message = loading_failure(OSError(errno.EIO, "Input/output error", "/models/a.gguf"))
    assert message == "the model cannot be loaded: [Errno 5] Input/output error: '/models/a.gguf'"
