"""What a path means: ~ is the home folder wherever a path is named, and runs find their text from any folder."""

import os
import pwd
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from support.project import ROOT

from configs import default
from wavelet_jax.analysis import report
from wavelet_jax.commands import cli
from wavelet_jax.data import load_corpus, tokenizers
from wavelet_jax.errors import UserError
from wavelet_jax.evaluation import evaluate
from wavelet_jax.files import reading
from wavelet_jax.paper import __main__ as paper_command
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, directory
from wavelet_jax.training import steps


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The user's home folder, another than the current one; afterwards no folder of ours is named "~"."""
    folder, current = tmp_path / "home", tmp_path / "current"
    folder.mkdir()
    current.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(current)
    yield folder
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith("~")]


def test_a_home_folder(home, monkeypatch):
    assert reading.user_path("~/runs/x", "--out") == home / "runs" / "x"
    assert reading.user_path("~", "--out") == home
    assert reading.user_path("runs/~x", "--out") == Path("runs/~x")
    assert reading.user_path("./~/x", "--out") == Path("~/x")
    with pytest.raises(UserError, match=r"--out is 'a\\x00b', and no path can have a zero byte"):
        reading.user_path("a\0b", "--out")
    assert reading.user_path(f"~{pwd.getpwuid(os.getuid()).pw_name}/x", "--out").is_absolute()


@pytest.mark.parametrize("text", ["~/x", "~", "~nobody-of-that-name/x"])
@pytest.mark.parametrize("home_is", [None, ""])
def test_a_home_folder_that_is_not_known(monkeypatch, text, home_is):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    if home_is is not None:
        monkeypatch.setenv("HOME", home_is)
    with pytest.raises(UserError, match=re.escape(f"--out is '{text}', and the home folder that ~ stands for is not")):
        reading.user_path(text, "--out")


def test_every_command_takes_a_home_folder(home):
    """As typed: in what is said of a folder, ~ is the home folder."""
    directory.save_config(home / "run", default.get_config())
    (home / "file").write_text("")
    smoke = f"--config={ROOT}/configs/smoke.py:rope"
    for command, said in (
        ([str(ROOT / "train.py"), smoke, "--workdir=~/file"], f"{home}/file cannot be used"),
        ([str(ROOT / "eval.py"), "--workdir=~/run", "--lengths=64", "--out=~/file"], f"{home}/file cannot be used"),
        (["-m", "wavelet_jax.analysis", "--workdir=~/run", "--out=~/file"], f"{home}/file cannot be used"),
        (["-m", "wavelet_jax.paper", "--results=~nobody-of-that-name/x"], "the home folder that ~ stands for is not"),
    ):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


def test_results_may_be_in_a_home_folder(home, monkeypatch):
    monkeypatch.setattr(paper_command, "RESULTS", SimpleNamespace(value=["~/none"]))
    monkeypatch.setattr(paper_command, "OUT", SimpleNamespace(value=None))
    with pytest.raises(UserError, match=f"^{home}/none has no extrapolation.csv"):
        paper_command.main()
    (home / "file").write_text("")
    monkeypatch.setattr(paper_command, "OUT", SimpleNamespace(value="~/file"))
    with pytest.raises(UserError, match=f"^{home}/file cannot be used"):
        paper_command.main()


def test_every_path_of_the_data_takes_a_home_folder(home, monkeypatch):
    (home / "text.txt").write_text("one\ntwo\nthree\nfour\n" * 50)
    config = default.get_config()
    config.data.update(source="text", train_files="~/*.txt", cache_dir="~/cache", document="line")
    config.data.validation_fraction = 0.5
    assert load_corpus(config).tokenizer.name == "byte"
    assert (home / "cache").is_dir()
    config.data.update(tokenizer="sentencepiece", tokenizer_file="~/no.model")
    with pytest.raises(UserError, match=r"cannot read config.data.tokenizer_file: .*home/no.model"):
        load_corpus(config)
    (home / "no.model").write_text("none")
    with pytest.raises(UserError, match=re.escape(f"config.data.tokenizer_file {home}/no.model")):
        tokenizers.specification(config)
    monkeypatch.setenv("HOME", "")
    for key in ("train_files", "cache_dir"):
        config = default.get_config()
        config.data.update(source="text", train_files="x.txt", cache_dir=str(home / "cache"))
        config.data[key] = "~/x"
        with pytest.raises(UserError, match=f"config.data.{key} is '~/x', and the home folder"):
            load_corpus(config)


@pytest.fixture
def old_run(small_config, tmp_path, monkeypatch):
    """A run whose config.json has relative paths and no folder, as of earlier versions, and the folder of its text."""
    folder = tmp_path / "project"
    (folder / "text").mkdir(parents=True)
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"document {number} of a small text\n" * 20)
    config = small_config("nope")
    config.model.num_layers = 1
    config.data.update(train_files="text/*.txt", cache_dir="cache")
    monkeypatch.chdir(folder)
    corpus, mesh = load_corpus(config), sharding.make_mesh(config)
    _, state, _ = steps.init(config, corpus.tokenizer.vocab_size, mesh)
    directory.save_config(folder / "run", config)
    with checkpoint.open_manager(folder / "run", config) as manager:
        checkpoint.save(manager, int(state.step), state, windows=0, fingerprint=corpus.fingerprint)
        checkpoint.wait(manager, 0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return folder / "run", folder


def test_runs_are_evaluated_from_another_folder(old_run, tmp_path):
    run, folder = old_run
    options = {"lengths": [32], "protocol": "full_length"}
    message = (
        rf"config.data.train_files: 'text/\*.txt' matches no file; that is what {run}/config.json "
        "says: for relative paths, --data_root=DIR names the folder that they are in now; absolute ones are"
    )
    with pytest.raises(UserError, match=message):
        evaluate.evaluate([run], **options, out=tmp_path / "out")
    look = {"length": 24, "layers": None, "heads": None, "thresholds": [], "labels": False, "texts": 0, "pixels": 64}
    with pytest.raises(UserError, match=message):
        report.analyse([run], **look, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (curve,) = evaluate.evaluate([run], **options, out=tmp_path / "out", data_root=folder)
    # A run that was trained by this version remembers where its text is.
    config = directory.load_config(run)
    config.data.folder = str(folder)
    directory.check_config(run, config)  # which is no other config
    directory.save_config(run, config)
    (again,) = evaluate.evaluate([run], **options, out=tmp_path / "out")
    assert (again.losses == curve.losses).all()
    # It can be moved with its text all the same.
    moved = folder.rename(tmp_path / "moved, elsewhere")
    (again,) = evaluate.evaluate([moved / "run"], **options, out=tmp_path / "out", data_root=moved)
    assert (again.losses == curve.losses).all()
    assert not list((tmp_path / "elsewhere").iterdir())  # no cache here


def parsed(*arguments: str) -> str | None:
    """What is said of a command line with these flags; None if nothing."""
    try:
        cli._parse(["command", *arguments])
        return None
    except UserError as error:
        return str(error)
    finally:
        flags.FLAGS.unparse_flags()


def test_a_flag_with_one_value_is_given_once(monkeypatch):
    values = flags.FlagValues()
    flags.DEFINE_list("lengths", [], "", flag_values=values)
    flags.DEFINE_string("name", None, "", flag_values=values)
    flags.DEFINE_bool("yes", None, "", flag_values=values)
    flags.DEFINE_multi_string("workdir", [], "", flag_values=values)
    flags.DEFINE_integer("config.train.steps", 0, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    assert parsed("--lengths=64", "--lengths=128") == (
        "--lengths is given 2 times, and only the last would count: give one, as --lengths=A,B"
    )
    assert parsed("--name=a", "--name=b", "--name=c") == (
        "--name is given 3 times, and only the last would count: give one"
    )
    assert parsed("--yes", "--noyes") is None  # of a switch the last one counts
    assert parsed("--workdir=a", "--workdir=b", "--lengths=64,128", "--name=a", "--yes") is None
    assert parsed("--config.train.steps=1", "--config.train.steps=2") is None  # a later change goes before an earlier
