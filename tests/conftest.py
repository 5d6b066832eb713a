"""Fixtures of several test files: a small corpus made on the spot, and configs of a model of seconds."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: workers of the test run share the cores
os.environ["TRITON_INTERPRET"] = "1"  # before triton, where it is installed: its kernels then run in NumPy

from pathlib import Path

import numpy as np
import pytest

from configs import smoke

# Why a test may be skipped in CI, which sets ALLOWED_SKIPS: what a machine may lack that has installed everything.
SKIPS = (
    "could not import 'libtpu'",  # the extra tpu
    "could not import 'x_transformers'",  # the extra bench
    "could not import 'jax_triton'",  # the extra cuda
    "needs JAX's CUDA plugin",
    "no file system can be mounted here",  # root in a container that allows it
    "no folder can be made immutable here",
    "not here: another file system",
    "refuses positions past its table",  # learned positions, which have a test of their own
)
_unexpected: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes a test that was skipped for another reason than `SKIPS`."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if not any(allowed in reason for allowed in SKIPS):
            _unexpected.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session with unexpected skips, where these are asked about."""
    if _unexpected and os.environ.get("ALLOWED_SKIPS") and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    """Names unexpected skips."""
    for line in _unexpected:
        terminalreporter.write_line(f"skipped for a reason that tests/conftest.py does not allow: {line}", red=True)


@pytest.fixture(scope="session")
def text_files(tmp_path_factory) -> Path:
    """A folder of 60 small documents with enough regularity for a loss to fall."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["wavelet", "of", "a", "scale", "and", "shift", "is", "position", "long", "context", "naïve"]
    for i in range(60):
        lines = (" ".join(rng.choice(words, size=12)) for _ in range(12))
        (folder / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_config(text_files, tmp_path_factory):
    """small_config(method) is configs/smoke.py on the small corpus, with a cache of its own."""
    cache = tmp_path_factory.mktemp("cache")

    def make(method: str = "wavelet"):
        config = smoke.get_config(method)
        config.data.update(source="text", train_files=str(text_files / "*.txt"), cache_dir=str(cache))
        config.data.validation_fraction = 0.2
        return config

    return make
