"""Files that a user or a crash has damaged are told of in one line, whichever command reads them."""

import json
import re

import pytest
from support.results import as_measured, lines_of, write_evaluation

from configs import default, quickstart
from wavelet_jax import positions
from wavelet_jax.analysis import report
from wavelet_jax.config import keys, saved
from wavelet_jax.data import file_digests, load_corpus
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate
from wavelet_jax.files import reading
from wavelet_jax.paper import compare
from wavelet_jax.runs import directory
from wavelet_jax.runs.metrics import MetricsLog, read_metrics

DEEP = b"[" * 100_000
# What is in a file -> what is said of its JSON; the parser's own words where it has some.
NOT_JSON = {
    b"": "Expecting value",
    b"{": "Expecting property name",
    b'{"train": {"steps": 1': "Expecting ',' delimiter",
    b"\x00" * 64: "Expecting value",
    b"\xff\xfe\x00\x01": "'utf-8' codec can't decode",
    b'{"a": "\xe9"}': "'utf-8' codec can't decode",
    DEEP: "it is nested too deeply",
    b'{"a":' * 100_000: "it is nested too deeply",
    '{"train": {}}'.encode("utf-16"): "'utf-8' codec can't decode",
    b"9" * 10_000: "Exceeds the limit",
}


def said_by(use) -> str:
    """The one line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as refused:
        use()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    return str(refused.value)


@pytest.mark.parametrize("content", NOT_JSON, ids=lambda content: repr(content[:12]))
def test_what_is_not_json_is_said_of_every_file(tmp_path, content, small_config):
    reason = NOT_JSON[content]
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "stamp.json").write_bytes(content)
    assert f"{tmp_path}/config.json is damaged (it is not JSON ({reason}" in said_by(
        lambda: directory.load_config(tmp_path)
    )
    assert "config.json is damaged" in said_by(lambda: directory.check_config(tmp_path, default.get_config()))
    assert f"{tmp_path}/stamp.json is damaged" in said_by(lambda: compare._stamp(tmp_path))
    if content and b"\n" not in content:  # an empty line says nothing, and is passed over
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + content + b'\n{"step": 3}\n')
        said = said_by(lambda: read_metrics(tmp_path))
        assert said.startswith(f"{tmp_path}/metrics.jsonl, line 2 is not JSON ({reason}")
        assert said.endswith("mend or remove the line")
    config = small_config()
    (tmp_path / "text.jsonl").write_bytes(b'{"text": "one"}\n' + (content or b"{") + b"\n")
    config.data.update(source="jsonl", train_files=str(tmp_path / "text.jsonl"))
    assert "text.jsonl" in said_by(lambda: load_corpus(config))  # zero bytes are "not text" there


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ([], "it holds a list, not sections of keys"),
        (None, "it holds null, not"),
        ("train", "it holds 'train', not"),
        ({"train": None}, "section 'train' is null, not keys and values"),
        ({"train": [1]}, "section 'train' is a list"),
        ({"train": {"steps": "many"}}, "train.steps is 'many', not a whole number"),
        ({"train": {"steps": 1.5}}, "train.steps is 1.5, not a whole number"),
        ({"train": {"steps": True}}, "train.steps is True, not a whole number"),
        ({"train": {"steps": None}}, "train.steps is null, not a whole number"),
        ({"model": {"use_bias": 1}}, "model.use_bias is 1, not true or false"),
        ({"model": {"dropout": "0"}}, "model.dropout is '0', not a number"),
        ({"model": {"cutoffs": [1, "2"]}}, "model.cutoffs is a list, not a list of whole numbers"),
        ({"compare": {"label": ["a"]}}, "compare.label is a list, not text"),
        ({"compare": {"variants": "rope"}}, "compare.variants is 'rope', not a list of texts"),
        (
            {"position": {"method": "wavelet", "scales": [[1.0], 2.0]}},
            "position.scales is a list, not a list of numbers",
        ),
        ({"position": {"method": "rope", "theta": {}}}, "position.theta is an object, not a number"),
        ({"later": {"key": {}}}, "later.key is an object, not a plain value"),
        ({"later": {"key": [[[1]]]}}, "later.key is a list, not a plain value"),
        ({"later": {"a.b": 1}}, "'a.b' cannot be the name of a section or key"),
        ({"a.b": {}}, "'a.b' cannot be the name of a section or key"),
        ({"config_version": 5}, "it is of version 5, and this code reads versions up to 4: update wavelet_jax"),
        ({"config_version": "2"}, "config_version is '2', not a whole number from 1"),
        ({"train": {"__class__": 1}}, "'__class__' cannot be the name of a section or key"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, tree, said):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for use in (
        lambda: directory.load_config(tmp_path),
        lambda: directory.check_config(tmp_path, default.get_config()),
        lambda: evaluate.evaluate([tmp_path], lengths=[64], protocol="full_length", out=tmp_path / "out"),
    ):
        assert said_by(use).startswith(f"{tmp_path}/config.json is damaged ({said}")
    assert not (tmp_path / "out").exists()


def test_types_are_those_of_the_configs():
    """Where this fails, a key was added to configs/default.py: give its type in wavelet_jax/config/saved.py."""
    for config in (*map(default.get_config, positions.METHODS), quickstart.get_config()):
        kinds = {key.replace("*", "validation"): kind for key, kind in saved.types(config.position.method).items()}
        values = keys.flatten(config)
        assert values.keys() == kinds.keys()
        for key, kind in kinds.items():
            assert isinstance(values[key], getattr(kind, "__origin__", kind)), key


def run_without(folder, config, *keys: str):
    """A run's folder whose config.json lacks some keys."""
    folder.mkdir()
    tree = json.loads(config.to_json())
    for key in keys:
        section, _, name = key.partition(".")
        (tree[section] if name else tree).pop(name or section)
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


LOOK = {"length": 24, "layers": None, "heads": None, "thresholds": [0.001], "labels": False, "texts": 0, "pixels": 64}


@pytest.mark.parametrize("missing", ["model.num_layers", "model", "data.source", "position.mother", "train.length"])
def test_a_key_that_is_read_and_missing_is_named(tmp_path, small_config, missing):
    run = run_without(tmp_path / "run", small_config(), missing)
    for use in (
        lambda: evaluate.evaluate([run], lengths=[64], protocol="full_length", out=tmp_path / "out"),
        lambda: report.analyse([run], **LOOK, out=tmp_path / "out"),
    ):
        said = said_by(use)
        if "has no checkpoint" in said:  # which is looked for before the model is built
            assert missing == "model.num_layers"
        else:
            assert said.startswith(f"{run}/config.json is of an earlier version, without {missing}, or damaged")
    assert not (tmp_path / "out").exists()


def test_a_missing_key_that_nothing_reads_is_no_error(tmp_path, small_config, caplog):
    """Runs of earlier versions can still be evaluated; keys of later versions are named."""
    config = small_config("rope")
    run = run_without(tmp_path / "run", config, "log.slow_update", "checkpoint", "mesh.context")
    tree = json.loads((run / "config.json").read_text())
    tree["compare"]["methods"], tree["later"] = ["rope"], {"key": 1}
    (run / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="has no checkpoint"):
        evaluate.evaluate([run], lengths=[64], protocol="full_length", out=tmp_path / "out")
    (warning,) = (record.getMessage() for record in caplog.records)
    assert "does not read: compare.methods, later.key" in warning.replace("later.key, compare.methods", "")
    copied = directory.load_config(run).copy_and_resolve_references()
    with pytest.raises(UserError, match=re.escape(f"{run}/config.json is of an earlier version, without log.slow_up")):
        _ = copied.log.slow_update
    assert copied.compare.lengths == config.compare.lengths


@pytest.mark.parametrize(
    "line", [b"[]", b"null", b"3", b'"step"', b"{}", b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}']
)
def test_a_line_of_metrics_is_an_object_with_its_step(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    assert said_by(lambda: read_metrics(tmp_path)).startswith(
        f'{path}, line 2 is not a JSON object with a whole number "step"'
    )
    assert said_by(lambda: MetricsLog(tmp_path, 1)).startswith(f"{path}, line 2")
    assert path.read_bytes() == b'{"step": 1}\n' + line + b"\n"


def test_a_torn_last_line_is_left_out_whatever_it_holds(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2, "lo\xff\x00\xfe')
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.encode("utf-16"), "is not a text file in UTF-8: save it as CSV in UTF-8"),
        (lambda text: text.replace("rope", "rop\xe9").encode("latin-1"), "is not a text file in UTF-8"),
        (lambda text: b"\xff\xfe" + bytes(range(256)), "is not a text file in UTF-8"),
        (lambda text: b"", "has no column method"),
        (lambda text: text.replace(",", ";").encode(), "has no column method"),
        (lambda text: text.encode() + b'"' + b"x" * 200_000 + b"\n", "line 3: cut short, or no number"),
        (lambda text: text.replace("512", "0").encode(), "line 2: cut short, or no number above 0"),
        (lambda text: text.replace("512", "-512").encode(), "line 2: cut short, or no number above 0"),
    ],
)
def test_a_csv_file_that_is_none_is_refused(tmp_path, damage, said):
    line = next(x for x in lines_of(1, 512) if x.length == 1012)
    folder = write_evaluation(tmp_path / "results", [as_measured(line, row="rope_theta1e4")])
    file = folder / "extrapolation.csv"
    text = file.read_text()
    file.write_bytes(damage(text))
    assert said in said_by(lambda: compare.measured(folder))
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte order mark is none of the header
    assert [x.row for x in compare.measured(folder)] == ["rope_theta1e4"]


@pytest.mark.parametrize(
    "content", [*NOT_JSON, b"[]", b"null", b'{"x": 1}', b'{"dtype": 5}', b'[["a", "b"]]', b'["ab"]']
)
def test_what_the_cache_keeps_is_made_again(tmp_path, small_config, content):
    """Digests and cached corpora are there for speed alone: nobody has to mend them."""
    config = small_config()
    config.data.cache_dir = str(tmp_path / "cache")
    first = load_corpus(config)
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    for name in (tmp_path / "cache" / file_digests._NAME, meta):
        name.write_bytes(content)
    again = load_corpus(config)
    assert again.fingerprint == first.fingerprint
    assert json.loads(meta.read_bytes())["fingerprint"] == first.fingerprint


def test_json_of_a_file(tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": [1, "é"]}'.encode())
    assert reading.read_json(tmp_path / "a.json") == {"a": [1, "é"]}
    with pytest.raises(FileNotFoundError):
        reading.read_json(tmp_path / "b.json")
