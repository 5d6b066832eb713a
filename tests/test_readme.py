"""The README's snippets run, and its commands are the ones that CI uses."""

import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.project import ROOT

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = re.findall(r"^python (?:train|eval)\.py .*$", README, flags=re.MULTILINE)


def arrays() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        name: jax.random.normal(key, (2, 9, 4, 16)) for name, key in zip(("query", "key", "value"), keys, strict=True)
    }


def expected(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Eq. (10) with Eq. (12) to (14), in float64 and query by query."""
    _, length, _, head_dim = query.shape
    out = np.zeros(query.shape)
    for m in range(length):
        distance = m - np.arange(m + 1)
        x = np.stack([(distance - b) / 2.0**a for a in range(8) for b in range(head_dim // 8)], axis=1)
        p = (1 - x**2) * np.exp(-(x**2) / 2)
        scores = np.einsum("bhd,bnhd->bhn", query[:, m], key[:, : m + 1]) + np.einsum("bhd,nd->bhn", query[:, m], p)
        weights = np.exp(scores / np.sqrt(head_dim))
        weights /= weights.sum(-1, keepdims=True)
        out[:, m] = np.einsum("bhn,bnhd->bhd", weights, value[:, : m + 1])
    return out


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    scope = arrays()
    reference = expected(*(np.asarray(array, np.float64) for array in scope.values()))
    exec(snippet, scope)
    # A snippet computes `out`, or makes a Flax `layer` around an attention function.
    out = scope["out"] if "out" in scope else scope["layer"].attention_fn(**arrays())
    np.testing.assert_allclose(out, reference, atol=1e-5)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path):
    """Every flag of every command is taken: what is refused is the one thing that the test spoils."""
    words = shlex.split(command, comments=True)
    spoilt, said = {
        "train.py": ("--config.train.steps=0", "error: train.steps must be at least 1, not 0"),
        "eval.py": ("--workdir=nowhere", "holds no run"),
    }[words[1]]
    command = [sys.executable, str(ROOT / words[1]), *words[2:], spoilt]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert said in ran.stderr


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
    assert len(COMMANDS) >= 4


def test_the_first_snippet_is_under_ten_lines():
    assert len(SNIPPETS[0].strip().splitlines()) < 10


def test_ci_finds_the_command():
    command = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest"
    assert command in README.splitlines()
    assert command in (ROOT / "CONTRIBUTING.md").read_text()


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)|src=\"([\w./-]+)\"", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
