"""The public names: all there, all documented, one version."""

import inspect
import re
import subprocess
import sys

import pytest
from support.project import ROOT, environment

import wavelet_jax
from wavelet_jax import attention, positions, wavelets

PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in (wavelet_jax, wavelets, positions, attention)
    for name in package.__all__
    if callable(getattr(package, name))
}


def documented(thing: object) -> str:
    """A docstring of the code's own: a dataclass without one would have its signature there."""
    text = inspect.getdoc(thing) or ""
    return "" if text.startswith(f"{getattr(thing, '__name__', '')}(") else text


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    """A sentence first; shapes where arrays are taken; errors where the code raises them."""
    text = documented(PUBLIC[name])
    first = text.split("\n\n")[0]
    assert first.rstrip().endswith((".", ":")), name
    assert not first.startswith("What "), name
    if not inspect.isfunction(PUBLIC[name]):
        return
    signature = inspect.signature(PUBLIC[name])
    if any("Array" in str(parameter.annotation) for parameter in signature.parameters.values()):
        assert re.search(r"\[[A-Z.]|scalar|[Ee]lementwise|array", text), f"{name} gives no shapes"
    if "raise UserError" in inspect.getsource(PUBLIC[name]) or "raise unknown" in inspect.getsource(PUBLIC[name]):
        assert "UserError" in text, f"{name} does not state its errors"


def test_every_public_name_is_there_and_nothing_else_is_promised():
    for name in wavelet_jax.__all__:
        assert getattr(wavelet_jax, name) is not None
    assert set(dir(wavelet_jax)) == set(wavelet_jax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'wavelett'"):
        _ = wavelet_jax.wavelett


def test_importing_the_package_imports_nothing_else():
    code = "import sys, wavelet_jax; print([m for m in ('jax', 'numpy', 'flax', 'ml_collections') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_there_is_one_version():
    assert f"version: {wavelet_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{wavelet_jax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
