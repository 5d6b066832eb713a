"""What is known of this machine's devices without asking JAX."""

import pytest

from wavelet_jax.hardware import devices


@pytest.mark.parametrize(
    ("files", "platforms", "expected"),
    [
        ((), "", False),
        (("null", "vfio/vfio", "nvidiactl"), "", False),  # also there without a device
        (("accel0",), "", True),
        (("vfio/0",), "tpu,cpu", True),
        (("nvidia0",), "", True),
        (("kfd",), "rocm", True),
        (("nvidia0",), "cpu", False),
    ],
)
def test_an_accelerator_is_known_by_its_file(tmp_path, monkeypatch, files, platforms, expected):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert devices.has_accelerator(tmp_path) == expected
