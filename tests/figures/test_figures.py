"""Pictures of wavelets show what they say: lines and images against the oracle's numbers, and ink in the files."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from support import oracle

from wavelet_jax.figures import style, wavelets
from wavelet_jax.wavelets import discrete, scale_shift_grid

# Values of up to 2 in float32 (see tests/test_wavelets.py), and t as a float.
VALUE = 2e-6


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of what is drawn, closed in the end."""
    kept = {}
    monkeypatch.setattr(style, "save", lambda figure, path, note="": kept.update({path.name: figure}))
    yield kept
    for figure in kept.values():
        plt.close(figure)


def test_the_paper_s_figures_of_wavelets(drawn, tmp_path):
    paths = wavelets.paper_wavelets(tmp_path / "out")
    assert [path.name for path in paths] == list(drawn)
    for name, exponents in (("figure_4.png", range(5)), ("figure_5.png", range(5, 10))):
        lines = drawn[name].axes[0].lines
        assert [line.get_label() for line in lines] == [f"$a = 2^{{{e}}}$" for e in exponents]
        for line, exponent in zip(lines, exponents, strict=True):
            t, values = line.get_data()
            slow = [oracle.psi("ricker", x, 2.0**exponent, 0.0) for x in t[::50]]
            np.testing.assert_allclose(values[::50], slow, rtol=0, atol=VALUE)
            assert values.max() > 0.98  # the smallest scale is a few steps wide
    for line in drawn["figure_6.png"].axes[0].lines:
        t, values = line.get_data()
        slow = [oracle.psi(line.get_label().lower(), x, 16.0, 0.0) for x in t[::50]]
        np.testing.assert_allclose(values[::50], slow, rtol=0, atol=VALUE)
    panels = [axes for name in ("figure_9.png", "figure_10.png") for axes in drawn[name].axes if axes.axison]
    assert [axes.get_title() for axes in panels] == list(discrete.TABLE_4)
    for axes in panels:
        x, values = axes.lines[0].get_data()
        slow = oracle.discrete_samples(axes.get_title(), 10)
        np.testing.assert_allclose(values[: len(slow)], slow, rtol=0, atol=1e-9)
        assert x[-1] == pytest.approx(discrete.filter_length(axes.get_title()) - 1, abs=3e-3)
    smooth, sampled = (axes for axes in drawn["position_tables.png"].axes if axes.images)
    grid = np.float64(scale_shift_grid(128))
    slow = np.stack([oracle.wavelet_vector(t, *grid) for t in range(300)], axis=1)
    np.testing.assert_allclose(smooth.images[0].get_array(), slow, rtol=0, atol=VALUE)
    slow = np.stack([oracle.discrete_vector(t, 128, "db4") for t in range(300)], axis=1)
    np.testing.assert_allclose(sampled.images[0].get_array(), slow, rtol=0, atol=VALUE)
    assert [text.get_text() for text in smooth.get_yticklabels()][-1] == "$2^7$"


def test_a_file_has_ink(tmp_path):
    wavelets.wavelets_by_scale(range(3), tmp_path / "a.png", "gaussian")
    image = plt.imread(tmp_path / "a.png")[..., :3]
    for colour in style.COLORS[:3]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        assert (np.abs(image - wanted).max(axis=-1) < 0.02).sum() > 300
