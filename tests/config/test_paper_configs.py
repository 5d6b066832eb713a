"""configs/paper: every variant builds, with the paper's numbers of parameters, and the small ones are stepped."""

import csv
import importlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from support.project import ROOT

from configs.paper import llama2, table1, table3, table4
from wavelet_jax.errors import UserError
from wavelet_jax.model import decoder, vocabulary
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import directory, throughput
from wavelet_jax.training import optimizer, steps

FILES = sorted(path.stem for path in (ROOT / "configs" / "paper").glob("*.py"))
TABLE_1 = [f"{size}{row}{length}" for size in ("", "small_") for row in table1.ROWS for length in ("", "_1024")]
METHODS_2 = ("rope", "wavelet", "alibi", "wavelet_pod", "transformer_xl_32k")
TABLE_2 = [f"{size}_{method}" for size in llama2.SIZES if size != "small" for method in METHODS_2]
WIKITEXT_103, LLAMA = 267_735, 32_000  # words


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling is nearly all the time that these tests take."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def count(config, vocab_size: int) -> int:
    """Parameters of the config's model; its layers are alike, and shapes of many take long."""
    layers, counts = config.model.num_layers, []
    for config.model.num_layers in (1, 2):
        _, abstract_state = steps.shapes(config, vocab_size, sharding.make_mesh(config))
        counts.append(steps.count_parameters(abstract_state.params))
    config.model.num_layers = layers
    return counts[0] + (layers - 1) * (counts[1] - counts[0])


def parts_build(config, vocab_size: int) -> None:
    """What a variant can have wrong, without the shapes of a whole decoder, which take a hundred times as long."""
    method = decoder.make_position(config)
    method.terms(jax.eval_shape(method.init, jax.random.key(0)))
    assert config.model.num_heads % config.model.num_kv_heads == 0
    if config.model.vocabulary == "adaptive":
        assert sum(stop - start for start, stop, _ in vocabulary.clusters(config, vocab_size)) == vocab_size
    optimizer.make_optimizer(config)


@pytest.mark.parametrize("name", FILES)
def test_docstrings_give_table_command_and_expectation(name):
    """The command names a variant that there is, and the numbers that are expected are the paper's."""
    module = importlib.import_module(f"configs.paper.{name}")
    variants = re.findall(rf"python train\.py --config=configs/paper/{name}\.py:(\S+)", module.__doc__)
    assert variants
    for variant in variants:
        module.get_config(variant)
    (table,) = re.findall(r"\ATable (\d)", module.__doc__)
    tables = {"4": "34"}.get(table, table)  # Table 4 shows two rows of Table 3 on top
    with (ROOT / "wavelet_jax" / "paper" / "results.csv").open() as file:
        known = {float(row["perplexity"] or 0) for row in csv.DictReader(file) if row["table"] in tables}
    said = module.__doc__.split("Expected perplexity")[1].split("Variants:")[0]
    expected = {float(number) for number in re.findall(r"\d+\.\d\d\b", said)}
    assert len(expected) >= 8
    assert expected <= known, expected - known


@pytest.mark.parametrize("variant", TABLE_1)
def test_every_variant_of_table_1_builds(variant):
    config = table1.get_config(variant)
    small, long = variant.startswith("small_"), variant.endswith("_1024")
    assert config.compare.label == variant.removeprefix("small_").removesuffix("_1024")
    assert config.train.length == (1024 if long else 512) // (4 if small else 1)
    assert config.train.batch_size * config.train.length == (2048 if small else 8 * 9216)
    assert config.train.length in config.compare.lengths
    parts_build(config, 33_278 if small else WIKITEXT_103)


@pytest.mark.parametrize("variant", ["", "1024", "small", "small_1024"])
def test_comparisons_of_table_1_are_of_its_six_methods(variant):
    config = table1.get_config(variant)
    assert len(config.compare.variants) == 6
    for name in config.compare.variants:
        one = table1.get_config(name)
        assert one.compare.variants == ()
        assert one.compare.lengths == config.compare.lengths
        assert one.train.length == config.train.length
    labels = [directory.label(table1.get_config(name)) for name in config.compare.variants]
    assert labels == ["nope", "rope_theta1e4", "rope_theta5e5", "transformer_xl", "alibi", "wavelet_ricker"]


def test_rows_of_table_1_differ_in_what_they_are_named_for():
    positions = {row: table1.get_config(row).position for row in table1.ROWS}
    assert (positions["rope_theta1e4"].theta, positions["rope_theta5e5"].theta) == (1e4, 5e5)
    assert positions["wavelet_gaussian"].mother == "gaussian"
    assert set(positions["wavelet_haar_fixed_scale"].scales) == {1.0}


def test_parameters_of_baevski_and_auli_s_model():
    """About 247M. fairseq's vocabulary has nine entries more than the text's words, <s>, <pad> and seven that make it a
    multiple of 8, of 64 numbers each; ours has the text's words, with </s> and <unk>."""
    config = table1.get_config("sinusoidal")
    blocks = 16 * (4 * 1024 * 1025 + 1025 * 4096 + 4097 * 1024 + 4 * 1024)  # attention, feed-forward, two norms
    words = 20_000 * 1024 + 40_000 * 256 + (WIKITEXT_103 - 60_000) * 64
    projections, classes = (1024 + 256 + 64) * 1024, 2 * 1024
    assert count(config, WIKITEXT_103) == blocks + words + projections + classes == 246_932_928
    assert count(config, 267_744) == 246_933_504
    # 16 layers of 12 d^2, cluster 0's projection, and the head.
    assert throughput.matrix_parameters(config, WIKITEXT_103) == 16 * 12 * 1024**2 + 1024 * (1024 + 20_002)


def test_rows_of_all_tables_have_the_same_parameters_but_those_of_their_positions():
    """Nothing outside of attention depends on the method, so that a row's count is 246,932,928 and its positions'."""

    def learned(config) -> int:
        arrays = jax.tree.leaves(jax.eval_shape(decoder.make_position(config).init, jax.random.key(0)))
        return sum(array.size for array in arrays)

    rows = {(table, row): table.get_config(row) for table in (table1, table3, table4) for row in table.ROWS}
    assert len({config.model.to_json() for config in rows.values()}) == 1
    some = {row: learned(config) for (_, row), config in rows.items() if learned(config)}
    # Transformer-XL: projected sinusoids and two biases, [d_model, H, D] and 2 [H, D] in each of 16 layers.
    assert some["transformer_xl"] == 1024 * 1024 + 2 * 1024
    assert set(some) == {"transformer_xl", "shaw", "t5", "learned"}
    assert count(rows[table1, "wavelet_ricker"], WIKITEXT_103) == 246_932_928
    assert count(rows[table1, "transformer_xl"], WIKITEXT_103) == 246_932_928 + 16 * some["transformer_xl"]


def test_weights_are_drawn_as_baevski_and_auli_s():
    """fairseq's: word vectors N(0, 1 / their width), Xavier's uniform for matrices, zero biases, norms of scale 1."""
    config = table1.get_config("small_wavelet")
    _, state, _ = steps.init(config, 12_000, sharding.make_mesh(config))
    seen = set()
    for path, array in jax.tree_util.tree_leaves_with_path(state.params):
        name, values = sharding.path_of(path), np.asarray(array, np.float64)
        kind = next(kind for kind in ("words", "bias", "scale", "") if kind in name)
        seen.add(kind)
        if kind == "words":
            assert values.std() == pytest.approx(values.shape[1] ** -0.5, rel=0.05), name
        elif kind in ("bias", "scale"):
            assert (values == (kind == "scale")).all(), name
        else:
            fan_in, fan_out = (values.shape[0], values.shape[-1]) if values.ndim == 2 else (128, 128)
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < np.abs(values).max() <= bound, name
            assert values.std() == pytest.approx(bound / 3**0.5, rel=0.15), name
    assert len(seen) == 4


@pytest.mark.parametrize("variant", TABLE_2)
def test_every_variant_of_table_2_builds(variant):
    config = llama2.get_config(variant)
    assert config.train.length == (32_768 if variant.endswith("_32k") else 4096)
    assert config.train.batch_size == {"_pod": 256, "_32k": 32}.get(variant[-4:], 1)
    assert config.position.method == variant.split("_", 1)[1].removesuffix("_pod").removesuffix("_32k")
    changed = {"wavelet": {"first_exponent": 2}, "rope": {"theta": 5e5}, "transformer_xl": {"theta": 5e5}}
    for option, value in changed.get(config.position.method, {}).items():
        assert config.position[option] == value
    parts_build(config, LLAMA)


@pytest.mark.parametrize("variant", ["", "7b", "100m", "small"])
def test_a_size_alone_compares_the_table_s_two_methods(variant):
    config = llama2.get_config(variant)
    labels = [llama2.get_config(name).compare.label for name in config.compare.variants]
    assert sorted(labels) == ["rope_theta5e5", "wavelet_ricker_a2^2..2^9"]
    assert {llama2.get_config(name).model.d_model for name in config.compare.variants} == {config.model.d_model}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("7b", 6_738_415_616),  # Meta's
        ("1b", 1_004_607_488),
        ("350m", 348_173_312),
        ("100m", 101_924_480),
        ("10m", 9_898_112),
        ("small", 9_898_112),
    ],
)
def test_parameters_of_llama_s_shape(size, expected):
    assert count(llama2.get_config(f"{size}_wavelet"), LLAMA) == expected


def test_unknown_variants_are_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"unknown variant of .*table1.py 'wavelet_riker': did you mean 'wavelet_ricker'"
    ):
        table1.get_config("wavelet_riker")
    with pytest.raises(UserError, match=r"unknown position method 'wavelte': did you mean 'wavelet'"):
        llama2.get_config("10m_wavelte")


def two_steps(config, vocab_size: int) -> None:
    """Two updates on words drawn evenly: all is finite, and every parameter moves."""
    config.optimizer.warmup_steps = 0  # the warm-up's first updates move by less than a parameter's rounding
    graphdef, state, _ = steps.init(config, vocab_size, sharding.make_mesh(config))
    train_step = jax.jit(steps.make_train_step(config, graphdef))
    rng = np.random.default_rng(0)
    for _ in range(2):
        tokens = rng.integers(0, vocab_size, steps.batch_shape(config)).astype(np.int32)
        before = state.params
        state, metrics = train_step(state, tokens)
        assert np.isfinite([float(metrics["loss"]), float(metrics["grad_norm"])]).all()
        pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True)
        still = [sharding.path_of(path) for (path, old), new in pairs if (old == new).all()]
        # A bias of all keys adds the same to a query's scores, which no softmax sees.
        assert [path for path in still if not path.endswith("key/bias")] == []
    assert int(state.skipped) == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in TABLE_1 if name.startswith("small_")])
def test_small_variants_of_table_1_take_two_steps(variant):
    config = table1.get_config(variant)
    config.train.batch_size = 2
    two_steps(config, 10_100)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "variant"), [(table, name) for table in (table3, table4) for name in table.SMALL])
def test_small_variants_of_tables_3_and_4_take_two_steps(table, variant):
    config = table.get_config(variant)
    config.train.batch_size = 2
    two_steps(config, 10_100)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wavelet", "rope"])
def test_ten_million_parameters_take_two_steps(method):
    config = llama2.get_config(f"small_{method}")
    config.train.batch_size = 2
    two_steps(config, LLAMA)


@pytest.mark.slow
def test_the_small_table_is_trained_and_drawn(tmp_path):
    """The command, on text of more words than the cutoffs: six runs, and the rows by their names."""
    rng = np.random.default_rng(0)
    for split, lines in (("train", 1200), ("valid", 300)):
        words = rng.zipf(1.1, (lines, 20)) % 12_000
        (tmp_path / f"{split}.tokens").write_text("".join(" ".join(f"w{i}" for i in line) + "\n" for line in words))
    flags = [f"--config.data.train_files={tmp_path}/train.tokens", f"--config.data.cache_dir={tmp_path}/cache"]
    flags += [f"--config.data.validation_files={tmp_path}/valid.tokens", "--config.train.steps=2"]
    flags += ["--config.model.cutoffs=(500, 2000)", "--config.train.batch_size=2", "--config.eval.windows=2"]
    flags += ["--config.optimizer.warmup_steps=1", "--config.data.source=text"]
    command = [sys.executable, str(ROOT / "train.py"), f"--config={ROOT}/configs/paper/table1.py:small", *flags]
    ran = subprocess.run(
        [*command, f"--workdir={tmp_path}/runs"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    with (tmp_path / "runs" / "extrapolation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["method"] for row in rows)) == list(table1.MAIN)
    for name in table1.MAIN:
        config = directory.load_config(tmp_path / "runs" / f"small_{name}")
        assert config.train.batch_size == 2
        assert config.position.method == table1.MAIN[name]["method"]
