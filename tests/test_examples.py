"""The examples run, learn, and show what they say they show."""

import difflib
import functools
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.project import ROOT

from wavelet_jax.wavelets import scale_shift_grid, wavelet_position

STEPS = 25
RUNS = [
    ("nnx_language_model", "--positions=wavelet"),
    ("linen_language_model", "--positions=wavelet"),
    ("bidirectional_encoder", "--grid=both_sides"),
    ("bare_jax", "--method=wavelet"),
]
OTHERS = [  # each some ten seconds, nearly all of it compiling
    ("nnx_language_model", "--positions=learned"),
    ("linen_language_model", "--positions=learned"),
    ("bidirectional_encoder", "--grid=paper"),
    *(("bare_jax", f"--method={method}") for method in ("rope", "alibi", "t5", "shaw", "transformer_xl")),
]


@functools.cache
def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # where inspect looks for sources
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "option"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in OTHERS)])
def test_learns(name, option, capsys):
    """From about ln 256 = 5.5 nats a byte, or more, to less than that of a model that only counts bytes (3.1 or so)."""
    losses = example(name).main([option, f"--steps={STEPS}"])
    assert len(losses) == STEPS
    assert losses[0] > 5
    share = np.bincount(np.frombuffer(Path(os.__file__).read_bytes(), np.uint8))
    share = share[share > 0] / share.sum()
    assert np.mean(losses[-5:]) < -np.sum(share * np.log(share))
    said = capsys.readouterr().out.splitlines()
    assert said[STEPS - 1].startswith(f"step {STEPS}: {losses[-1]:.3f} nats")
    longer = [line for line in said if line.startswith("held out, 256 bytes")]
    assert len(longer) == (option == "--positions=wavelet")
    if longer:  # trained at 64, at 256 no worse than by a tenth
        trained, four_times = (float(line.split()[4]) for line in said[-2:])
        assert four_times < trained + 0.1


def test_every_example_is_run():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {name for name, _ in RUNS}


def test_as_a_command():
    command = [sys.executable, "examples/bare_jax.py", "--help"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python examples/bare_jax.py --method=wavelet" in ran.stdout


@pytest.mark.parametrize("name", ["nnx_language_model", "linen_language_model"])
def test_positions_are_swapped_in_under_ten_lines(name):
    """Lines that go or come between the two models, and the two imports."""
    module = example(name)
    before, after = (inspect.getsource(each).splitlines() for each in (module.Before, module.After))
    changes = [line for line in difflib.ndiff(before[2:], after[2:]) if line[0] in "+-"]  # but for name and docstring
    imports = [line for line in inspect.getsource(module).splitlines() if line.startswith("from wavelet_jax")]
    assert any(line.startswith("+") and "PositionAttention" in line for line in changes)
    assert len(imports) == 2
    assert 3 <= len(changes) + len(imports) < 10


def test_what_the_encoder_says_of_its_grids():
    """Centred shifts: the tables of t and -t are one but for their order, and every centre after has one before."""
    t = np.arange(1, 30)

    def columns(scales, shifts):
        for distance in (t, -t):
            table = np.asarray(wavelet_position(distance, scales, shifts))
            yield table[:, np.lexsort(np.round(table, 4))]

    before, after = columns(*example("bidirectional_encoder").both_sides(16, num_scales=4))
    np.testing.assert_allclose(before, after, rtol=0, atol=1e-6)
    before, after = columns(*scale_shift_grid(16, num_scales=4))
    assert np.abs(before - after).max() > 0.1
    even = wavelet_position(np.stack([t, -t]), 2.0 ** np.arange(4), np.zeros(4))
    np.testing.assert_array_equal(even[0], even[1])
