"""RoPE as a wavelet transform, windows, attention maps and receptive fields, held to formulas and slow loops."""

import csv
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.compilation import quick_jit
from support.project import ROOT
from support.results import fake_maps

from configs import smoke
from wavelet_jax import positions
from wavelet_jax.analysis import attention_maps, pictures, receptive_field, report, windows
from wavelet_jax.analysis import rope_as_wavelet as theory
from wavelet_jax.attention import attention
from wavelet_jax.data import load_corpus
from wavelet_jax.errors import UserError
from wavelet_jax.model.decoder import Decoder
from wavelet_jax.parallel import sharding
from wavelet_jax.positions.rope import rotate
from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.training import steps

EPS = 2.0**-53
VOCAB = 50

# -- RoPE as a wavelet transform --------------------------------------------------------------------------------------

whole_positions = st.integers(0, 10**6)
even_sizes = st.integers(1, 48).map(lambda half: 2 * half)


def rounding(d: int, k: int) -> float:
    """t - b_j is wrong by a rounding of a number of up to d, twice; f multiplies that by 2 k pi."""
    return 2 * EPS * (d + 1) * 2 * math.pi * k + 8 * EPS


@given(m=whole_positions, d=even_sizes)
@settings(max_examples=100, deadline=None)
def test_the_wavelet_matrix_is_ropes(m, d):
    """Eq. (8) against Eq. (6) and (17), entry by entry in the definition's own indices."""
    k = theory.turns(m)
    found = theory.wavelet_matrix(theory.rotation_angles(m, d), k)
    expected = np.zeros((d, d))
    for i in range(1, d // 2 + 1):
        angle = m * 10000.0 ** (-2 * (i - 1) / d)
        row = 2 * (i - 1)
        expected[row, row], expected[row, row + 1] = math.cos(angle), -math.sin(angle)
        expected[row + 1, row], expected[row + 1, row + 1] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(d, k))
    np.testing.assert_allclose(theory.rotations(theory.rotation_angles(m, d)), expected, rtol=0, atol=4 * EPS * (1 + m))


@pytest.mark.parametrize("m", [0, 1, 7, 1000, 100_000])
def test_the_wavelet_matrix_is_what_our_rope_does(m):
    """The model's own rotation, interleaved layout, of the unit vectors."""
    d = 32
    units = jnp.eye(d)[None, :, None, :]
    rotated = rotate(units, jnp.full(d, m, jnp.int32), layout="interleaved")[0, :, 0]
    matrix = theory.wavelet_matrix(theory.rotation_angles(m, d), theory.turns(m))
    np.testing.assert_allclose(rotated.T, matrix, rtol=0, atol=2e-6)  # float32


@given(m=whole_positions, d=even_sizes)
def test_f_and_delta_are_those_of_the_existence_proof(m, d):
    k = theory.turns(m)
    assert (k - 1) * 2 * math.pi <= m < k * 2 * math.pi
    angles = theory.rotation_angles(m, d)
    delta = theory.delta(angles, k)
    assert ((delta >= 0) & (delta < 1)).all()
    np.testing.assert_allclose(theory.f(delta, k), angles, rtol=4 * EPS, atol=0)
    # 1 + delta loses the digits of delta below 2^-52.
    np.testing.assert_allclose(theory.f(1 + delta, k), angles, rtol=0, atol=4 * EPS * 2 * math.pi * k)


@pytest.mark.parametrize("m", [0, 3, 20, 1000])
@pytest.mark.parametrize("wavelet", [theory.psi, theory.psi_odd])
def test_the_wavelets_have_zero_mean_and_unit_energy(wavelet, m):
    """Eq. (20) and (1): sums over whole turns at equal steps, more than two a turn, are exact but for rounding."""
    k = theory.turns(m)
    steps = 4 * k + 1
    t = (np.arange(-steps, 3 * steps) + 0.5) / steps
    values = wavelet(t, k)
    assert abs(np.sum(values) / steps) < 1e-12 * k
    assert np.sum(values**2) / steps == pytest.approx(1, abs=1e-12 * k)
    assert not values[(t < 0) | (t >= 2)].any()


@given(angles=st.lists(st.floats(0, 40 * math.pi - 1e-9), min_size=1, max_size=16))
def test_any_angles_have_their_wavelet_matrix(angles):
    """What the argument shows is no property of RoPE's frequencies: any 2 x 2 rotations are such a matrix."""
    matrix = theory.wavelet_matrix(np.array(angles), 20)
    np.testing.assert_allclose(matrix, theory.rotations(np.array(angles)), rtol=0, atol=rounding(len(matrix), 20))


def test_the_wavelet_depends_on_the_position():
    assert [theory.turns(m) for m in (0, 6, 7, 12, 13, 20)] == [1, 1, 2, 2, 3, 4]
    t = np.linspace(0, 2, 50, endpoint=False)
    assert np.abs(theory.psi(t, theory.turns(6)) - theory.psi(t, theory.turns(7))).max() > 0.5
    with pytest.raises(UserError, match="below 2 k pi, with k = 1"):
        theory.wavelet_matrix(theory.rotation_angles(7, 8), theory.turns(6))


def test_haar_is_rope_where_every_angle_is_an_eighth_turn():
    """A.3, and PyWavelets' Haar: rows of RoPE at m theta = pi / 4 are its details and approximations."""
    d, signal = 8, np.random.default_rng(0).standard_normal(8)
    haar = theory.haar_matrix(d)
    angles = np.full(d // 2, math.pi / 4)
    np.testing.assert_allclose(theory.rotations(angles), haar, rtol=0, atol=2 * EPS)
    np.testing.assert_allclose(theory.wavelet_matrix(angles, 1), haar, rtol=0, atol=rounding(d, 1))
    approximation, detail = pywt.dwt(signal, "haar")
    np.testing.assert_allclose(haar @ signal, np.stack([detail, approximation], 1).ravel(), rtol=0, atol=8 * EPS)
    # As Eq. (24) is printed, its last row repeats the one above.
    printed = haar.copy()
    printed[-1, -1] *= -1
    assert np.linalg.matrix_rank(printed) == d - 1


@pytest.mark.parametrize("d", [2, 6, 16])
def test_rope_is_no_fourier_transform(d):
    """A.4: a row of the transform meets all of the signal, one of RoPE's a pair, in any order of rows and columns."""
    signal = np.random.default_rng(1).standard_normal(d)
    np.testing.assert_allclose(theory.dft_matrix(d) @ signal, np.fft.fft(signal, norm="ortho"), rtol=0, atol=1e-14)
    assert (theory.entries_by_row(theory.dft_matrix(d)) == d).all()
    for m in (1, 20):
        assert (theory.entries_by_row(theory.rotations(theory.rotation_angles(m, d))) == 2).all()


def test_scores_depend_on_distance_only():
    """Eq. (27): R_m^T R_n = R_(n - m)."""
    by_position = [theory.rotations(theory.rotation_angles(m, 16)) for m in (5, 90, 85)]
    np.testing.assert_allclose(by_position[0].T @ by_position[1], by_position[2], rtol=0, atol=200 * EPS)


@pytest.mark.parametrize(("m", "d", "said"), [(1, 7, "d 7 must be even"), (1, 0, "d 0"), (-1, 8, "position -1")])
def test_what_rope_cannot_have_is_refused(m, d, said):
    with pytest.raises(UserError, match=said):
        theory.rotation_angles(m, d)


# -- windows ----------------------------------------------------------------------------------------------------------


@given(slope=st.floats(1e-3, 2), share=st.floats(0.01, 0.999), length=st.integers(1, 3000))
def test_alibi_windows_are_those_of_the_softmax(slope, share, length):
    probability = np.exp(-slope * np.arange(length))
    reached = np.cumsum(probability / probability.sum())
    t = windows.alibi_window(slope, share, length)
    assert 0 <= t < length
    assert reached[t] >= share - 1e-9
    assert t == 0 or reached[t - 1] < share + 1e-9
    endless = windows.alibi_window(slope, share)
    assert endless >= t
    assert math.exp(-slope * (endless + 1)) <= 1 - share + 1e-9  # what lies past it
    assert math.exp(-slope * endless) > 1 - share - 1e-9


@given(slope=st.floats(1e-3, 2), threshold=st.floats(1e-5, 0.5))
def test_alibi_bands_are_what_passes_the_threshold(slope, threshold):
    t = np.arange(20_000)
    passing = (1 - np.exp(-slope)) * np.exp(-slope * t) >= threshold * (1 + 1e-9)
    surely_not = (1 - np.exp(-slope)) * np.exp(-slope * t) < threshold * (1 - 1e-9)
    band = windows.alibi_band(slope, threshold)
    assert not passing[band + 1 :].any()
    assert not surely_not[: band + 1].any()


def test_wavelet_windows_are_sums_over_the_scale():
    """Ricker, 4 scales and shifts 0 to 3, from the formula in float64."""
    method = positions.make("wavelet", num_heads=2, head_dim=16, num_scales=4)
    found = windows.wavelet_windows(method)
    assert [window.scale for window in found] == [1, 2, 4, 8]
    t = np.arange(400)
    for window in found:
        mass = np.zeros(len(t))
        for shift in range(4):
            x = (t - shift) / window.scale
            values = (1 - x**2) * np.exp(-(x**2) / 2)
            mass += np.abs(values)
            assert np.abs(values[window.support + 1 :]).max() < 1e-4
        reached = np.cumsum(mass) / mass.sum()
        for share, distance in zip(windows.SHARES, window.distances, strict=True):
            assert reached[distance] >= share - 1e-5  # float32 values, cut at the support
            assert reached[distance - 1] < share + 1e-5
    assert found[0].support < found[3].support


def test_a_wavelet_past_any_text_has_no_window():
    method = positions.make("wavelet", num_heads=1, head_dim=8, num_scales=8, first_exponent=120)
    assert {window.support for window in windows.wavelet_windows(method)} == {None}
    assert windows.wavelet_windows(method)[0].distances == (None, None, None)


def test_distance_of_a_share():
    mass = np.array([0.5, 0.25, 0.0, 0.25])
    assert [windows.distance_of(mass, share) for share in (0.5, 0.51, 0.75, 0.76, 1.0)] == [0, 1, 1, 3, 3]
    assert windows.distance_of(np.zeros(3), 0.5) is None


# -- attention maps ---------------------------------------------------------------------------------------------------


@functools.cache
def make_model(method: str, **model) -> Decoder:
    config = smoke.get_config(method)
    config.model.update({"num_kv_heads": 1, "num_layers": 1, **model})
    decoder = Decoder(config, VOCAB, rngs=nnx.Rngs(0))
    for block in decoder.blocks:  # larger weights: attention is then far from uniform
        block.query.kernel[...] *= 3.0
    return decoder


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (1, length)).astype(np.int32)


@quick_jit
def read(model: Decoder, tokens, cache):
    """Probabilities of the first layer in the block of tokens that comes next, and the attention that they make."""
    start = cache.filled
    queries, cache = attention_maps.queries_of(model, tokens, cache)
    key, value = cache.keys[0], cache.values[0]
    weights = attention_maps.probabilities(model, 0, queries[0], key, start)
    output = attention(
        queries[0], key, value, model.terms(), query_positions=start, key_positions=0, backend="reference"
    )
    return queries[0], weights, output, cache


# By default the methods that enter in different places: relative keys, a rotation, a bias.
FIRST = ("wavelet", "rope", "alibi")


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[] if method in FIRST else pytest.mark.slow)
        for method in positions.METHODS
        if method in oracle.KNOWN
    ],
)
def test_probabilities_are_the_softmax_of_the_scores(method):
    """Every query and key of two blocks read through the cache, against a float64 loop, and against attention."""
    model = make_model(method)
    tokens, cache = ids(12), model.init_cache(1, 12)
    position = model.blocks[0].position if model.method.per_layer else model.position
    params = {name: np.asarray(param[...], np.float64) for name, param in position.items()}
    blocks = []
    for start in (0, 6):
        query, weights, output, cache = read(model, tokens[:, start : start + 6], cache)
        blocks.append((np.asarray(query[0], np.float64), np.asarray(weights[0]), output[0]))
    key, value = (np.asarray(array[0, :, 0], np.float64) for array in (cache.keys[0], cache.values[0]))
    query, weights, output = (
        np.concatenate(parts, axis) for parts, axis in zip(zip(*blocks, strict=True), (0, 1, 0), strict=True)
    )
    expected = np.zeros((2, 12, 12))
    for head in range(2):
        for m in range(12):
            scores = [oracle.score(method, {}, params, head, 2, query[m, head], key[n], m, n) for n in range(m + 1)]
            exponentials = np.exp(np.array(scores) - max(scores))
            expected[head, m, : m + 1] = exponentials / exponentials.sum()
    # Scores of up to some ten in float32, and wavelets within 1e-6.
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.einsum("hts,sd->thd", weights, value), output, rtol=0, atol=1e-5)
    assert weights.max(axis=-1).mean() > 0.2  # nothing near uniform was compared


def built(model: Decoder, length: int, **arguments) -> tuple[attention_maps.Program, dict]:
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    config = smoke.get_config()
    chosen = {"num_heads": 2, "layers": (0,), "heads": (0, 1), "pixels": 64} | arguments
    return attention_maps.build(graphdef, abstract, sharding.make_mesh(config), length=length, **chosen), params


def test_maps_are_maxima_and_sums_of_the_whole_matrix(monkeypatch):
    """29 tokens in blocks of 9, 9, 9 and 2 queries, cells of 3: the last ones are not whole."""
    monkeypatch.setattr(attention_maps, "_SCORES", 2 * 29 * 10)
    model, tokens = make_model("alibi"), ids(29)
    program, params = built(model, 29, heads=(1,), pixels=10)
    assert program.blocks == [(0, 9), (9, 18), (18, 27), (27, 29)]
    seen = []
    maps = attention_maps.measure(program, params, tokens[0], first_counted=11, done=seen.append)
    assert sum(seen) == 29

    _, weights, _, _ = read(model, tokens, model.init_cache(1, 29))
    whole = np.asarray(weights[0, 1], np.float64)
    assert maps.highest.shape == (1, 1, 10, 10)
    for row in range(10):
        for column in range(10):
            cell = whole[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            assert maps.highest[0, 0, row, column] == pytest.approx(cell.max(), abs=1e-6)
    mass = np.zeros(29)
    for m in range(11, 29):
        for n in range(m + 1):
            mass[m - n] += whole[m, n] / 18
    np.testing.assert_allclose(maps.mass[0, 0], mass, rtol=0, atol=1e-6)
    assert maps.mass.sum() == pytest.approx(1, abs=1e-5)
    for share in windows.SHARES:
        assert maps.distances(share)[0, 0] == np.argmax(np.cumsum(mass) >= share)


def test_memory_of_a_long_text_is_that_of_a_block(monkeypatch):
    """4,096 tokens in blocks of 256 queries: no array of 4,096 x 4,096 numbers (64 MiB a head)."""
    monkeypatch.setattr(attention_maps, "_SCORES", 2 * 4096 * 256)
    program, _ = built(make_model("alibi"), 4096)
    assert len(program.blocks) == 16
    temporary = program.steps[256].memory_analysis().temp_size_in_bytes
    assert temporary < 8 * (2 * 256 * 4096 * 4) < 2 * 4096**2 * 4


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(attention_maps.memory, "available", lambda: (2**20, "this machine"))
    with pytest.raises(UserError, match=r"attention at length 64 would take .* lower --length"):
        built(make_model("nope"), 64)


# -- gradients --------------------------------------------------------------------------------------------------------


def test_gradients_by_position_are_those_of_the_tokens_own_embeddings():
    """Of a text without a token twice, the gradient of the table of embeddings has each position's in its own row."""
    model = make_model("wavelet", tied_head=False)
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    text = np.random.default_rng(0).permutation(VOCAB)[:11].astype(np.int32)[None]

    def loss(params):
        logits = nnx.merge(graphdef, params)(text[:, :-1])
        return -jax.nn.log_softmax(logits[0, -1])[text[0, -1]]

    rows = quick_jit(jax.grad(loss))(params)["embedding"]["embedding"]
    norms = np.linalg.norm(np.asarray(rows, np.float64)[text[0, :-1]], axis=-1)
    found = quick_jit(receptive_field.make_gradient(graphdef, 32))(params, text)
    np.testing.assert_allclose(found[0], norms[::-1] / norms.sum(), rtol=1e-4)
    assert np.asarray(found).sum() == pytest.approx(1, abs=1e-5)


def test_cumulative_gradients_are_means_over_texts():
    """Texts at the places that `texts` gives, and shares added up from the last token."""
    tokens = np.arange(100)

    def gradient(text):  # all of it at the distance that the text's first token says
        assert text.shape == (1, 5)
        return np.eye(4)[text[:, 0] % 4]

    starts = receptive_field.texts(100, 4, 3)
    assert starts == [0, 47, 95]
    curve = receptive_field.cumulative_gradient(gradient, tokens, 4, starts)
    np.testing.assert_allclose(curve, [1 / 3, 1 / 3, 1 / 3, 1])  # 0 % 4, 47 % 4 and 95 % 4 are 0, 3 and 3
    assert receptive_field.texts(6, 4, 10) == [0, 1]


# -- pictures and the command -----------------------------------------------------------------------------------------


def pixels_of(path) -> np.ndarray:
    from matplotlib import image

    return image.imread(path)[..., :3]


def test_maps_are_drawn_as_the_threshold_says(tmp_path):
    maps = fake_maps()
    assert (pictures.classes(maps, 3, 0, 0.01) == 2).sum() == 8 * 64 - 28
    assert (pictures.classes(maps, 3, 1, 0.01) == 2).sum() == 0
    assert (pictures.classes(maps, 3, 1, 0.001)[:, 0] == 2).all()
    assert (np.triu(pictures.classes(maps, 3, 0, 0.01), 1) == 0).all()
    dark = []
    for threshold in (0.001, 0.01):
        path = tmp_path / f"{threshold}.png"
        pictures.attention_map({"a": maps, "b": maps}, 3, threshold, path, note="a note")
        seen = pixels_of(path)
        assert min(seen.shape[:2]) > 300
        yellow = np.abs(seen - np.array([245, 233, 168]) / 255).max(axis=-1) < 0.02
        assert yellow.mean() > 0.1
        dark.append((seen.max(axis=-1) < 0.1).mean())
    assert dark[1] > 0.02
    assert dark[0] > 1.02 * dark[1]  # the first token's column is black at 0.001 alone


def test_receptive_fields_and_gradients_are_drawn(tmp_path):
    alibi = positions.make("alibi", num_heads=2, head_dim=16)
    wavelet = positions.make("wavelet", num_heads=2, head_dim=16)
    rows = receptive_field.rows("alibi", alibi, fake_maps()) + receptive_field.rows("ours", wavelet, fake_maps())
    measured = [row for row in rows if row["kind"] == "measured"]
    assert [(row["head"], row["distance_50"], row["distance_99"]) for row in measured[:2]] == [(0, 3, 7), (1, 63, 63)]
    slopes = [row["slope"] for row in rows if row["kind"] == "alibi_window"]
    assert slopes == [1 / 16, 1 / 256]
    assert [row["scale"] for row in rows if row["kind"] == "wavelet_scale"] == [2.0**n for n in range(8)]
    pictures.receptive_field(rows, 64, tmp_path / "a.png", note="")
    pictures.receptive_field(measured[:2], 64, tmp_path / "b.png", note="")
    pictures.gradient({"a": np.linspace(0.5, 1, 64)}, [16], tmp_path / "c.png", note="")
    coloured = {name: (np.ptp(pixels_of(tmp_path / f"{name}.png"), axis=-1) > 0.3).sum() for name in "abc"}
    assert coloured["a"] > 2 * coloured["b"] > 100
    assert coloured["c"] > 300


@pytest.mark.slow
def test_pictures_that_need_no_run(tmp_path):
    for path in pictures.without_a_run(tmp_path / "new"):
        seen = pixels_of(path)
        assert min(seen.shape[:2]) > 300
        assert (np.ptp(seen, axis=-1) > 0.3).mean() > 0.002, path


@pytest.fixture(scope="module")
def run_of(small_config, tmp_path_factory):
    """run_of(method): the directory of a run that was saved before its first update."""

    def make(method: str):
        workdir = tmp_path_factory.mktemp("runs") / method
        config = small_config(method)
        config.model.num_layers = 1
        corpus = load_corpus(config)
        mesh = sharding.make_mesh(config)
        _, state, _ = steps.init(config, corpus.tokenizer.vocab_size, mesh)
        directory.save_config(workdir, config)
        with checkpoint.open_manager(workdir, config) as manager:
            checkpoint.save(manager, int(state.step), state, windows=0, fingerprint=corpus.fingerprint)
            checkpoint.wait(manager, 0)
        return workdir

    return make


ARGUMENTS = {
    "length": 24,
    "layers": None,
    "heads": None,
    "thresholds": [0.001],
    "labels": False,
    "texts": 1,
    "pixels": 64,
}


def test_what_is_written_and_what_is_refused(run_of, tmp_path):
    workdir, out = run_of("alibi"), tmp_path / "out"
    for wrong, said in (
        ({"layers": [0, 1]}, "--layers 1: allowed are 0 to 0"),
        ({"heads": [-1, 2]}, "--heads -1, 2: allowed are 0 to 1"),
        ({"length": 1}, "--length must be at least 2, not 1"),
        ({"length": 10**7}, "longer than the validation text"),
        ({"thresholds": [2.0]}, "--threshold 2 must be a probability"),
        ({"labels": True, "length": 400}, "--labels needs a --length of at most 64, not 400"),
        ({"texts": -1}, "--texts must be at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            report.analyse([workdir], **ARGUMENTS | wrong, out=out)
    with pytest.raises(UserError, match="holds no run"):
        report.analyse([tmp_path / "nowhere"], **ARGUMENTS, out=out)
    assert not out.exists()

    written = report.analyse([workdir], **ARGUMENTS | {"labels": True}, out=out)
    assert sorted(path.name for path in written) == sorted(path.name for path in out.iterdir())
    assert {path.name for path in written} == {
        "attention_map_layer0_0.001.png",
        "gradient.csv",
        "gradient.png",
        "receptive_field.csv",
        "receptive_field.png",
        "stamp.json",
    }
    with (out / "receptive_field.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == receptive_field.COLUMNS
    assert [(row["kind"], row["head"]) for row in rows] == [
        ("measured", "0"),
        ("measured", "1"),
        ("alibi_window", "0"),
        ("alibi_window", "1"),
    ]
    # The slope of head 1 is a sixteenth of that of head 0.
    assert int(rows[0]["distance_50"]) < int(rows[1]["distance_50"])
    with (out / "gradient.csv").open() as file:
        curve = [float(row["alibi"]) for row in csv.DictReader(file)]
    assert len(curve) == 24
    assert (np.diff(curve) >= 0).all()
    assert curve[-1] == pytest.approx(1, abs=1e-5)
    stamp = json.loads((out / "stamp.json").read_text())
    assert stamp["length"] == 24
    assert stamp["updates"] == {"alibi": 0}
    assert stamp["receptive_field"] == "mean over queries 12 to 23"


@pytest.mark.slow
def test_the_command(run_of, tmp_path):
    """As it is typed, with two runs side by side, and bad input in one line."""
    import subprocess
    import sys

    def run(*arguments: object):
        command = [sys.executable, "-m", "wavelet_jax.analysis", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    both = [f"--workdir={run_of(method)}" for method in ("alibi", "wavelet")]
    ran = run(*both, "--length=40", "--heads=1", "--texts=0", f"--out={tmp_path / 'out'}")
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "attention_map_layer0_0.001.png").exists()
    assert not (tmp_path / "out" / "gradient.csv").exists()
    assert run("--figures", f"--out={tmp_path / 'figures'}").returncode == 0
    for wrong in ([*both, "--layers=one"], ["--figures"], ["--figures", *both]):
        ran = run(*wrong, f"--out={tmp_path / 'no'}") if "--figures" not in wrong or both[0] in wrong else run(*wrong)
        assert ran.returncode == 2, ran.stderr
        assert ran.stderr.startswith("error: ")
        assert len(ran.stderr.splitlines()) == 1
