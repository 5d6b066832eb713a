"""The README's snippets run, and its commands are the ones that CI uses."""

import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from wavelet_jax import positions
from wavelet_jax.attention import attention

README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def arrays() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        name: jax.random.normal(key, (2, 9, 4, 16)) for name, key in zip(("query", "key", "value"), keys, strict=True)
    }


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(snippet):
    scope = arrays()
    exec(snippet, scope)
    terms = positions.make("wavelet", num_heads=4, head_dim=16).terms({})
    expected = attention(scope["query"], scope["key"], scope["value"], terms)
    np.testing.assert_allclose(scope["out"], expected, atol=1e-5)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


def test_the_first_snippet_is_under_ten_lines():
    assert len(SNIPPETS[0].strip().splitlines()) < 10


def test_ci_finds_the_command():
    command = "python3 -m venv .venv && . .venv/bin/activate && pip install -e '.[test]' && pytest"
    assert command in README.splitlines()
    assert command in (ROOT / "CONTRIBUTING.md").read_text()


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\(([\w./-]+)\)|src=\"([\w./-]+)\"", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
