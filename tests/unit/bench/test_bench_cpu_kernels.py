"""The timed C++ is compiled apart from the engine's library, so it must follow what it includes."""

import pytest

pytest.importorskip("numba")

from bench.cpu_kernel_library import FORMATS, Kernels, Layers
from llm.ops.cpu.native import library


@pytest.mark.skipif(library.compiler() is None, reason="no C++ compiler")
@pytest.mark.timeout(300)
def test_every_format_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.cpu_kernel_library._READ_BYTES", 1 << 20)
    monkeypatch.setattr("bench.cpu_kernel_library._SECONDS", 0.001)
    monkeypatch.setattr(Kernels, "ceiling", lambda self, format: 1.0)
    kernels = Kernels(1, None)
    assert kernels.read_rate > 0
    for format in FORMATS:
        layers = Layers(format, ((48, 64), (16, 96)))
        assert layers.multiply_adds == 48 * 64 + 16 * 96
        assert all(0 < kernels.seconds(layers, rows) < 20 for rows in (1, 70))
        assert kernels.prepare_seconds(layers, 3) > 0
