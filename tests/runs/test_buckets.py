"""Runs in a bucket, in an emulator of Google's storage: kills, damage, the lease, evaluations, bad input."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.buckets import BUCKET, emulator
from support.project import ROOT, environment, program, run
from support.states import FINGERPRINT, abstract, make_state, restore, same

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.files import places
from wavelet_jax.runs import checkpoint, directory, leases
from wavelet_jax.runs.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def bucket():
    with emulator():
        yield


@pytest.fixture
def workdir(request) -> Path:
    """A place for a run that no other test uses."""
    return places.at(f"gs://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}/run", "--workdir")


@pytest.fixture(scope="module")
def flags(text_files, tmp_path_factory) -> list[str]:
    keys = ["log.every=1", "checkpoint.every=5", "train.steps=20", "eval.every=10", "data.source=text"]
    keys += [f"data.train_files={text_files}/*.txt", "data.validation_fraction=0.2"]
    keys += [f"data.cache_dir={tmp_path_factory.mktemp('cache')}"]
    return [f"--config={ROOT}/configs/smoke.py:rope", *(f"--config.{key}" for key in keys)]


def start(workdir, flags: list[str], *, lease: float = 2, moment: str = "never") -> subprocess.Popen:
    command = [*program("train_in_a_bucket", lease, moment), *flags, f"--workdir={workdir}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    _, said = process.communicate(timeout=200)
    return process.returncode, said


def losses(workdir) -> list[tuple]:
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in read_metrics(workdir)]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nobody has killed, in a folder: (its losses, the same run's place in the bucket)."""
    folder, place = tmp_path_factory.mktemp("whole") / "run", places.at(f"gs://{BUCKET}/whole/run", "--workdir")
    for workdir in (folder, place):
        code, said = ended(start(workdir, flags))
        assert code == 0, said
    return losses(folder), place


# -- training ---------------------------------------------------------------------------------------------------------


def test_a_run_in_a_bucket_is_that_in_a_folder(whole):
    expected, workdir = whole
    assert losses(workdir) == expected
    assert [step for step, *_ in expected] == list(range(1, 21))
    files = {"config.json", "metrics.jsonl", "sessions.jsonl"}  # no lock
    assert set(places.names(workdir)) == {*files, "checkpoints", "tensorboard"}
    assert places.names(workdir / "checkpoints") == ["15", "20"]
    (events,) = places.files(workdir / "tensorboard")
    assert places.size(events) > 1000


def test_a_killed_run_goes_on_to_the_same_losses(whole, flags, workdir):
    process = start(workdir, flags)
    try:
        deadline = time.monotonic() + 100
        while len(read_metrics(workdir)) < 7:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()
    assert "lock" in places.names(workdir)  # nobody has let go of it
    code, said = ended(start(workdir, flags))
    assert code == 0, said
    assert f"{workdir} was being trained by process {process.pid} on" in said
    assert losses(workdir) == whole[0]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_in_a_save_changes_no_loss(whole, flags, workdir, moment):
    """A checkpoint counts from its checksums on."""
    code, said = ended(start(workdir, flags, moment=moment))
    assert code == -9, said
    assert "10" in places.names(workdir / "checkpoints")
    assert checkpoint.latest_step(workdir) == (10 if moment == "after" else 5)
    code, said = ended(start(workdir, flags))
    assert code == 0, said
    assert f"updates {10 if moment == 'after' else 5} to 20" in said
    assert "damaged" not in said
    assert losses(workdir) == whole[0]
    assert places.names(workdir / "checkpoints") == ["15", "20"]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def save(workdir: Path, *steps: int) -> None:
    with checkpoint.open_manager(workdir, smoke.get_config()) as manager:
        for step in steps:
            checkpoint.save(manager, step, make_state(step), windows=8 * step, fingerprint=FINGERPRINT)
            checkpoint.wait(manager, step)


@pytest.mark.parametrize(
    "file",
    [
        "state/manifest.ocdbt",
        *(pytest.param(file, marks=pytest.mark.slow) for file in ("data/metadata", "checksums.b2")),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(workdir, file, caplog):
    save(workdir, 20, 40)
    damaged = workdir / "checkpoints" / "40" / file
    places.write(damaged, bytes([places.read(damaged)[0] ^ 1]) + places.read(damaged)[1:])
    before = places.files(workdir)
    params, step = checkpoint.restore_params(workdir, abstract(make_state(0).params), fingerprint=FINGERPRINT)
    assert step == 20
    assert same(params, make_state(20).params)
    assert places.files(workdir) == before
    said = [record.getMessage() for record in caplog.records if " is damaged" in record.getMessage()]
    assert said == [
        f"the checkpoint {workdir}/checkpoints/40 is damaged ({file} is not as it was written): the one of update 20 "
        "is used"
    ]
    state, windows = restore(workdir)
    assert same(state, make_state(20))
    assert windows == 160
    assert places.names(workdir / "checkpoints") == ["20", "damaged-40"]
    save(workdir, 40)
    assert same(restore(workdir)[0], make_state(40))


def test_a_file_that_is_gone_is_damage_and_no_checkpoint_at_all_is_said(workdir):
    save(workdir, 20)
    places.remove(workdir / "checkpoints" / "20" / "data" / "metadata")
    with pytest.raises(UserError, match=r"can be read: 20 \(data/metadata is missing\); restore one"):
        restore(workdir)
    places.remove(workdir / "checkpoints" / "20" / "checksums.b2")
    with pytest.raises(UserError, match=r"can be read: 20 \(checksums.b2 is missing\); restore one"):
        restore(workdir)


def test_what_is_left_of_a_removal_is_removed(workdir):
    save(workdir, 20, 40)
    places.write(workdir / "checkpoints" / "3" / "state" / "part", b"")
    assert checkpoint.latest_step(workdir) == 40
    restore(workdir)
    assert places.names(workdir / "checkpoints") == ["20", "40"]


# -- the lease --------------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_and_takes_over_from_one_that_is_gone(workdir, monkeypatch):
    monkeypatch.setattr(leases, "SECONDS", 2)
    command = program("holding_a_run", workdir, 2)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes) as first:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"^{workdir} is being trained by process {first.pid} on \S+: wait for it"),
            directory.locked(workdir),
        ):
            pass
        first.kill()
        first.wait()
    start = time.monotonic()
    with directory.locked(workdir):
        assert time.monotonic() > start + 2
        time.sleep(1.5)  # renewed meanwhile
        with pytest.raises(UserError, match="is being trained by process"), directory.locked(workdir):
            pass
    assert places.names(workdir) == []
    with directory.locked(workdir):  # at once
        pass


def test_of_two_that_take_over_one_does(workdir, monkeypatch):
    monkeypatch.setattr(leases, "SECONDS", 1)
    places.write(workdir / "lock", b"process 1 on gone\n")
    taken, refused, release = [], [], threading.Event()

    def take():
        try:
            with directory.locked(workdir):
                taken.append(1)
                release.wait(20)
        except UserError as error:
            refused.append(str(error))
            release.set()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 1)


def test_a_holder_that_lost_its_lease_ends(workdir, flags):
    process = start(workdir, [*flags, "--config.train.steps=100000", "--config.checkpoint.every=100000"])
    try:
        deadline = time.monotonic() + 100
        while not read_metrics(workdir):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
        places.write(workdir / "lock", b"process 2 on another\n")
        code, said = ended(process)
    finally:
        process.kill()
    assert code == 2, said
    assert said.splitlines()[-1] == (
        f"error: {workdir} was taken over by process 2 on another, after this process had not been heard of for 2 s"
    )


# -- metrics, results, bad input --------------------------------------------------------------------------------------


def test_metrics_that_cannot_be_written_wait(workdir, monkeypatch):
    log = places.open_log(workdir / "metrics.jsonl", b"1\n")
    log.write(b"2\n")
    with monkeypatch.context() as context:
        context.setattr(places, "write", lambda *_: (_ for _ in ()).throw(places.Unreachable(5, "gone")))
        with pytest.raises(OSError, match="gone"):
            log.write(b"3\n")
    assert log.write(b"3\n4\n") == 4
    assert places.read(workdir / "metrics.jsonl") == b"1\n2\n3\n4\n"


def test_eval_reads_a_bucket_and_writes_one(whole, workdir):
    done = run([sys.executable, "eval.py", f"--workdir={whole[1]}", "--lengths=32,64", f"--out={workdir}"])
    assert done.returncode == 0, done.stderr
    names = ["extrapolation.csv", "extrapolation.png", "loss_by_position.png", "stamp.json"]
    assert places.names(workdir) == names
    assert all(f"{workdir}/{name}" in done.stdout for name in names)
    rows = list(csv.DictReader(io.StringIO(places.read(workdir / names[0]).decode())))
    assert [row["length"] for row in rows] == ["32", "64"]
    assert json.loads(places.read(workdir / "stamp.json"))["runs"] == [str(whole[1])]


def test_results_that_cannot_be_uploaded_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    mirror = places.Mirror(places.at("gs://nobody-has-made-this/out", "--out"))
    (mirror.local / "numbers.csv").write_text("1")
    with pytest.raises(OSError, match=f"what could not be written there is in {mirror.local}"):
        mirror.close()
    assert (mirror.local / "numbers.csv").read_text() == "1"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("s3://bucket/run", "is 's3://bucket/run': s3:// is not known; gs://BUCKET/PATH and folders are"),
        ("gs://", "is 'gs://', which is not gs://BUCKET/PATH"),
        ("gs://nobody-has-made-this/run", "gs://nobody-has-made-this/run cannot be used: there is no bucket"),
    ],
)
def test_bad_addresses_are_one_line(whole, flags, address, said):
    for script, arguments in (
        ("train.py", [*flags, f"--workdir={address}"]),
        ("eval.py", [f"--workdir={address}", "--lengths=32", f"--out={whole[1]}/out"]),
        ("eval.py", [f"--workdir={whole[1]}", "--lengths=32", f"--out={address}"]),
    ):
        done = run([sys.executable, script, *arguments])
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr[-1500:]
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else found(name))
    with pytest.raises(UserError, match=r"^gs://bucket/run needs gcsfs: pip install 'wavelet_jax\[gcs\]'"):
        places.at("gs://bucket/run", "--workdir")


def test_a_path_of_an_address_is_that_address():
    assert str(places.given(Path("gs://bucket/run"))) == "gs://bucket/run"
    assert places.given("runs/x") == Path("runs/x")
