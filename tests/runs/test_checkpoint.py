"""Checkpoints that are damaged in every way, saves that fail, the lock, and the guards."""

import logging
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compilation import quick_jit
from support.project import ROOT, environment, free_port, program, run
from support.states import FINGERPRINT, abstract, flip, make_state, restore, same

from configs import smoke
from wavelet_jax.errors import UserError
from wavelet_jax.parallel import sharding
from wavelet_jax.runs import checkpoint, checksums, directory, guards
from wavelet_jax.runs.metrics import MetricsLog, read_metrics
from wavelet_jax.training import steps

PACKAGE = Path(checkpoint.__file__).parent


def save(workdir: Path, *steps: int) -> None:
    with checkpoint.open_manager(workdir, smoke.get_config()) as manager:
        for step in steps:
            checkpoint.save(manager, step, make_state(step), windows=8 * step, fingerprint=FINGERPRINT)
            checkpoint.wait(manager, step)


def restore_params(workdir: Path):
    return checkpoint.restore_params(workdir, abstract(make_state(0).params), fingerprint=FINGERPRINT)


@pytest.fixture
def warned(caplog):
    """warned() gives our warnings since it was last called (on a slow disk orbax has some of its own)."""

    def take() -> list[str]:
        ours = (record for record in caplog.records if PACKAGE in Path(record.pathname).parents)
        said = [record.getMessage() for record in ours if record.levelno >= logging.WARNING]
        caplog.clear()
        return said

    return take


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with checkpoints of updates 20 and 40; copied, never changed."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 20, 40)
    return workdir


def copy(saved: Path, place: Path) -> Path:
    """A copy of a run; returns the folder of its newest checkpoint."""
    shutil.copytree(saved, place)
    return place / "checkpoints" / "40"


def everything(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty_folder(path: Path) -> None:
    remove(path)
    path.mkdir()


def replace_by_file(path: Path) -> None:
    remove(path)
    path.write_text("")


def cases(newest: Path) -> list[tuple]:
    """(what is done, to which path of the newest checkpoint, arguments)."""
    found = [path.relative_to(newest) for path in sorted(newest.rglob("*"))]
    files = [path for path in found if (newest / path).is_file()]
    folders = [path for path in found if (newest / path).is_dir()]
    made = [(how, path) for path in files for how in (truncate, empty, remove)]
    made += [(flip, path, where, mask) for path in files for where, mask in zip((0, 0.5, 1), (1, 64, 128), strict=True)]
    made += [(how, path) for path in [*folders, Path()] for how in (remove, empty_folder, replace_by_file)]
    return made


def test_whatever_is_damaged_the_values_are_right(saved, tmp_path, warned):
    """Each file of the newest truncated, emptied, flipped or removed; each folder removed, emptied, replaced.

    Only two files may be damaged unseen: those that orbax writes last, which nothing reads.
    """
    right = {step: make_state(step) for step in (20, 40)}
    outcomes = {20: 0, 40: 0}
    for number, (how, path, *arguments) in enumerate(cases(saved / "checkpoints" / "40")):
        workdir = tmp_path / str(number)
        newest = copy(saved, workdir)
        how(newest / path, *arguments)
        case = f"{how.__name__} {path} {arguments}"

        before = everything(workdir)
        params, step = restore_params(workdir)
        assert same(params, right[step].params), case
        assert everything(workdir) == before, case
        gone = how is remove and path == Path()
        assert step == (40 if str(path) in ("_CHECKPOINT_METADATA", "commit_success.txt") else 20), case
        said = warned()
        assert len(said) == (step == 20 and not gone), (case, said)

        state, windows = restore(workdir)
        assert same(state, right[step]), case
        assert windows == 8 * step
        left = sorted(path.name for path in (workdir / "checkpoints").iterdir())
        if said:
            assert f"{newest} is damaged (" in said[0], case
            assert ": the one of update 20 is used" in said[0], case
            assert left == ["20", "damaged-40"], case
        assert warned() == []  # the same line as before
        outcomes[step] += 1
        shutil.rmtree(workdir)
    print(f"damaged in {sum(outcomes.values())} ways: fell back {outcomes[20]}, loaded {outcomes[40]}, wrong values 0")
    assert outcomes[20] > 5 * outcomes[40] > 0
    assert sum(outcomes.values()) > 100


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: empty(folder / "data" / "metadata"), "data/metadata is empty"),
        (lambda folder: flip(folder / "data" / "metadata", 0.5, 1), "data/metadata is not as it was written"),
        (lambda folder: remove(folder / "state" / "_METADATA"), "state/_METADATA is missing"),
        (lambda folder: remove(folder / checksums.NAME), "checksums.b2 is missing"),
        (lambda folder: truncate(folder / checksums.NAME), "checksums.b2 is not as it was written"),
        (lambda folder: empty_folder(folder), "it is empty"),
        (lambda folder: replace_by_file(folder), "it is not a folder"),
    ],
)
def test_the_warning_says_why(saved, tmp_path, warned, damage, reason):
    newest = copy(saved, tmp_path / "run")
    damage(newest)
    restore(tmp_path / "run")
    (line,) = warned()
    assert f"({reason})" in line


def test_the_run_goes_on_after_a_damaged_checkpoint(saved, tmp_path):
    """Saves at the same update again, and then damaged again: nothing that was set aside is lost."""
    workdir = tmp_path / "run"
    for left in (["20", "damaged-40"], ["20", "damaged-40", "damaged-40-2"]):
        newest = workdir / "checkpoints" / "40"
        if not workdir.exists():
            copy(saved, workdir)
        truncate(newest / "state" / "manifest.ocdbt")
        assert same(restore(workdir)[0], make_state(20))
        assert sorted(path.name for path in newest.parent.iterdir()) == left
        save(workdir, 40)
        assert same(restore(workdir)[0], make_state(40))


def test_none_readable_is_an_error_and_never_a_fresh_start(saved, tmp_path):
    workdir = tmp_path / "run"
    newest = copy(saved, workdir)
    empty(newest / "data" / "metadata")
    remove(newest.parent / "20" / checksums.NAME)
    before = everything(workdir)
    said = r"checkpoints can be read: 40 \(data/metadata is empty\), 20 \(checksums.b2 is missing\); restore one"
    for load in (restore, restore_params, restore):
        with pytest.raises(UserError, match=said):
            load(workdir)
    assert everything(workdir) == before
    checksums.write(newest.parent / "20")  # it is sound, only from before there were checksums
    assert same(restore(workdir)[0], make_state(20))
    remove(newest.parent / "20")
    with pytest.raises(UserError, match=r"damaged-40 \(set aside before\)"):
        restore(workdir)


def test_a_run_killed_in_its_first_save_starts_fresh(saved, tmp_path, warned):
    newest = copy(saved, tmp_path / "run")
    remove(newest.parent / "20")
    remove(newest / checksums.NAME)
    newest.rename(f"{newest}.orbax-checkpoint-tmp")
    assert checkpoint.latest_step(tmp_path / "run") is None
    assert restore(tmp_path / "run") is None
    assert list(newest.parent.iterdir()) == []
    assert restore(tmp_path / "never") is None
    with pytest.raises(UserError, match="never has no checkpoint: train it first"):
        restore_params(tmp_path / "never")
    assert warned() == []


def _without(tree: dict, name: str) -> dict:
    return {key: leaf for key, leaf in tree.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda params: _without(params, "kernel"),
            "params/kernel is float32 [64, 40] in the checkpoint and absent in the model (arrays that differ: 1)",
        ),
        (
            lambda params: params | {"bias": params["kernel"]},
            "params/bias is absent in the checkpoint and float32 [64, 40] in the model",
        ),
        (
            lambda params: params | {"kernel": jax.ShapeDtypeStruct((40, 64), jnp.float32)},
            "params/kernel is float32 [64, 40] in the checkpoint and float32 [40, 64] in the model",
        ),
        (
            lambda params: params | {"kernel": jax.ShapeDtypeStruct((64, 40), jnp.bfloat16)},
            "params/kernel is float32 [64, 40] in the checkpoint and bfloat16 [64, 40] in the model",
        ),
    ],
)
def test_parameters_must_be_those_of_the_model(saved, change, said):
    """Neither evaluation nor training takes a part of a checkpoint, or a checkpoint for a part of a model."""
    state = abstract(make_state(0))
    sharding = state.step.sharding
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), change(state.params)
    )
    for use in (
        lambda: checkpoint.restore_params(saved, params, fingerprint=FINGERPRINT),
        lambda: checkpoint.restore(saved, state.replace(params=params), fingerprint=FINGERPRINT),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as refused:
            use()
        assert "\n" not in str(refused.value)


def test_the_state_of_another_optimizer_is_refused(saved):
    state = abstract(make_state(0))
    other = state.replace(opt_state=({"mu": state.params},))
    with pytest.raises(UserError, match=r"opt_state/0/count is int32 \[\] in the checkpoint and absent in the model"):
        checkpoint.restore(saved, other, fingerprint=FINGERPRINT)
    assert same(restore_params(saved)[0], make_state(40).params)  # which asks for no optimizer


def test_checksums_are_those_of_b2sum(saved):
    """An implementation that is not ours reads them."""
    if not (b2sum := shutil.which("b2sum")):
        pytest.skip("there is no b2sum")
    folder = saved / "checkpoints" / "40"
    command = [b2sum, "--length=256", "--strict", "--check", checksums.NAME]
    out = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    checked = {line.removesuffix(": OK") for line in out}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there - checked == {checksums.NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}


def test_what_a_killed_save_left_is_removed_whatever_it_is(saved, tmp_path):
    copy(saved, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "60.orbax-checkpoint-tmp").mkdir()
    (folder / "80.orbax-checkpoint-tmp").write_text("")
    assert same(restore(tmp_path / "run")[0], make_state(40))
    assert sorted(path.name for path in folder.iterdir()) == ["20", "40"]


def test_a_save_that_fails_leaves_the_last_good_one_and_the_next_tries_again(tmp_path):
    """In a process of its own: threads of orbax complain of it when they are collected."""
    out = run(program("failing_saves", tmp_path))
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == ["['1']", "['1', '2']", "['1', '2']", "['1', '2']", "['2', '5']"]
    # On a slow disk orbax adds that a save had to wait for the one before.
    first, last = (line for line in out.stderr.splitlines() if "the checkpoint of update" in line)
    for step, line in ((3, first), (4, last)):
        assert f"the checkpoint of update {step} could not be written (Failed to write" in line
        assert "File too large" in line
        assert "the newest is that of update 2" in line
    assert first.endswith(": the run continues")
    assert last.endswith("; make room, and give the same command again")


def test_metrics_wait_for_room_on_the_disk(tmp_path, warned):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = MetricsLog(tmp_path, 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, limit[1]))
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": 1 / step, "grad_norm": float("inf")})
        cut = (tmp_path / "metrics.jsonl").read_bytes()
        assert len(cut) == 60  # in the middle of the second line
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.write(5, {"loss": 0.2, "grad_norm": 0.5})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(cut)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["grad_norm"] for line in lines] == [None, None, None, None, 0.5]
    (said,) = warned()
    assert "metrics of update 2 are not written yet" in said


def test_a_second_trainer_is_refused(tmp_path):
    command = program("holding_a_run", tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=ROOT, env=environment(), **pipes)
    with first:
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"is being trained by process {first.pid} on \S+: wait"),
            directory.locked(tmp_path),
        ):
            pass
        first.kill()  # the kernel lets go of what it held
        first.wait()
    with directory.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "use", [directory.check_folder, directory.load_config]
)  # of --workdir and --out; of runs to evaluate
@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket"])
def test_an_address_is_no_folder(use, address):
    with pytest.raises(UserError, match=f"^{address} is an address: mount it and give the folder$"):
        use(Path(address))


# -- guards -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned_step():
    """(train_step, state, tokens): `poison(state)` makes the next update non-finite and `cure` undoes it."""
    config = smoke.get_config()
    config.train.update(batch_size=2, length=16)
    graphdef, state, _ = steps.init(config, 257, sharding.make_mesh(config))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (1, 2, 17)), jnp.int32)
    return quick_jit(steps.make_train_step(config, graphdef)), state, tokens


def with_scale(state: steps.State, value: float) -> steps.State:
    """The state with another scale in its final norm."""
    params = jax.tree.map(lambda x: x, state.params)
    params["final_norm"]["scale"] = jnp.full_like(params["final_norm"]["scale"], value)
    return state.replace(params=params)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_changes_nothing_but_its_counters(poisoned_step, value):
    train_step, state, tokens = poisoned_step
    state, metrics = train_step(state, tokens)
    assert int(metrics["skipped"]) == int(metrics["skipped_in_a_row"]) == 0
    after = bad = with_scale(state, value)
    for number in (1, 2):
        after, metrics = train_step(after, tokens)
        assert not np.isfinite(float(metrics["loss"])) or not np.isfinite(float(metrics["grad_norm"]))
        for name in ("params", "opt_state"):
            for now, before in zip(
                jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(bad, name)), strict=True
            ):
                assert np.asarray(now).tobytes() == np.asarray(before).tobytes()
        assert int(after.step) == int(state.step) + number
        assert int(after.skipped) == int(after.skipped_in_a_row) == number
    scale = float(state.params["final_norm"]["scale"][0])
    cured, metrics = train_step(with_scale(after, scale), tokens)
    assert (int(cured.skipped), int(cured.skipped_in_a_row)) == (2, 0)
    assert np.isfinite(float(metrics["loss"]))
    assert not same(cured.params, state.params)


def test_the_learning_rate_is_that_of_the_updates_made(poisoned_step):
    train_step, state, tokens = poisoned_step
    rates = []
    for skipped in (0, 1, 2):
        _, metrics = train_step(state.replace(step=jnp.int32(2 + skipped), skipped=jnp.int32(skipped)), tokens)
        rates.append(float(metrics["learning_rate"]))
    assert rates[0] == rates[1] == rates[2] > 0


class Lines:
    """Stands for a `MetricsLog`."""

    def __init__(self):
        self.written = {}

    def write(self, step, metrics):
        self.written[step] = metrics


def update(in_a_row: int) -> dict:
    loss = jnp.float32(np.nan if in_a_row else 1.0)
    return {"loss": loss, "grad_norm": loss, "skipped": jnp.int32(in_a_row), "skipped_in_a_row": jnp.int32(in_a_row)}


@pytest.mark.parametrize("allowed", [0, 1, 3])
@pytest.mark.parametrize("look", [False, True])
def test_one_more_than_allowed_stops_the_run(tmp_path, allowed, look):
    config = smoke.get_config()
    config.train.skip_nonfinite = allowed
    log = Lines()
    with guards.Guard(config, tmp_path, log) as guard:
        guard.made(1, update(0), look=look)
        for number in range(1, allowed + 1):  # as many as allowed, an update in between, as many again
            guard.made(1 + number, update(number), look=look)
        guard.made(allowed + 2, update(0), look=look)
        first = allowed + 3
        for number in range(allowed):
            guard.made(first + number, update(number + 1), look=look)
        bad = first + allowed
        if not look:  # it is seen one later
            guard.made(bad, update(allowed + 1), look=False)
        with pytest.raises(UserError, match=rf"update {bad}: loss nan, gradient norm nan.*train.skip_nonfinite"):
            guard.made(bad if look else bad + 1, update(allowed + 1 if look else allowed + 2), look=look)
    assert list(log.written) == [bad]


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ([], "; no checkpoint was saved before it: "),
        (["none-yet"], "; no checkpoint was saved before it: "),
        (["20"], "; the checkpoints in .* are from before it: "),
        (["20.orbax-checkpoint-tmp"], "; the checkpoints in .* are from before it: "),  # which is being written
    ],
)
def test_the_message_speaks_of_checkpoints_where_there_are_some(tmp_path, there, said):
    for name in there:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    config = smoke.get_config()
    config.train.skip_nonfinite = 0
    with guards.Guard(config, tmp_path, Lines()) as guard, pytest.raises(UserError, match=said):
        guard.made(1, update(1), look=True)


def test_a_slow_update_is_told_once(warned):
    now = 0.0
    watch = guards._Watch(factor=10, least=1.0, clock=lambda: now)

    def pass_by(seconds: float) -> list[str]:
        """The warnings of the watch's thread in this time, which looks four times a second."""
        nonlocal now
        for _ in range(round(4 * seconds)):
            now += 0.25
            watch.look()
        return warned()

    for step in range(1, 12):
        now += 0.002
        watch.ended(step)
    assert pass_by(1.0) == []
    (said,) = pass_by(60)  # the twelfth hangs
    assert "update 12 has taken 1.2 s so far, and the median is 0.002 s" in said
    watch.ended(12)
    now += 0.002
    watch.ended(13)  # after an update of usual speed it would warn again
    watch.pause()
    assert pass_by(100) == []  # a validation
    watch.resume()
    now += 0.002
    watch.ended(14)
    (said,) = pass_by(2)
    assert "update 15" in said


def test_the_watch_looks_by_itself(warned):
    watch = guards._Watch(factor=10, least=0.01)
    for step in range(1, 12):
        watch.ended(step)
    watch.start()
    deadline = time.monotonic() + 60
    while not (said := warned()) and time.monotonic() < deadline:
        time.sleep(0.01)
    watch.close()
    assert "update 12 has taken" in said[0]


# -- several processes ------------------------------------------------------------------------------------------------


def in_two_processes(name: str, workdir: Path, code: int) -> list[tuple[str, str]]:
    """What the two processes say, on stdout and stderr, of two processes that run a program and end with this code."""
    port = free_port()
    processes = [
        subprocess.Popen(
            program(name, port, number, workdir),
            cwd=ROOT,
            env=environment(devices=2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [code, code], said
    return said


@pytest.mark.slow
def test_two_processes_agree_on_what_to_load_and_when_to_stop(tmp_path):
    """Only one of them gets the signal, and only one reads the checksums."""
    said = in_two_processes("agree_on_a_checkpoint", tmp_path, code=143)
    steps = {int(out.split()[-1]) for out, _ in said}  # Gloo has said something before
    assert len(steps) == 1
    assert 7 <= steps.pop() <= 9
    assert "ocdbt.process_1/d/" in said[0][1]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["20", "damaged-40"]


@pytest.mark.slow
def test_a_save_that_fails_in_one_process_is_given_up_by_all(tmp_path):
    """The one that could write waits for the other, says so, and gives up after checkpoint.timeout; both go on."""
    (_, first), (_, second) = in_two_processes("failing_in_one", tmp_path, code=0)
    assert "the run has waited for the checkpoint of update 2 for 1 s: a slow disk, or a process that failed" in first
    assert "update 2 could not be written (not done within checkpoint.timeout: the disk is slow, or another" in first
    assert "update 2 could not be written (Failed to write" in second
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "3"]
