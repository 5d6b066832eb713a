"""Several processes on one machine as one run: the same data, losses and files as one process makes."""

import collections
import csv
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from support.project import ROOT, environment, free_port, program

from wavelet_jax.data import Windows
from wavelet_jax.errors import UserError
from wavelet_jax.parallel import peers, processes, sharding
from wavelet_jax.runs.metrics import read_metrics

# A line that JAX's communication over the network writes on stdout, without its numbers.
GLOO = "[Gloo] Rank  is connected to  peer ranks. Expected number of connected peer ranks is : \n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, 1),  # a batch script's own shell
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": ""}, 1),
    ],
)
def test_the_environment_counts_processes(environment, expected):
    assert processes.count(environment) == expected


@pytest.mark.parametrize(
    ("environment", "shared"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, False),
        ({"SLURM_STEP_NUM_TASKS": "32", "SLURM_STEP_NUM_NODES": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, True),
        ({"SLURM_STEP_NUM_TASKS": "8", "CUDA_VISIBLE_DEVICES": "3"}, False),  # --gpus-per-task=1
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, True),
    ],
)
def test_whose_gpus_a_process_sees(environment, shared):
    assert processes.shares_gpus(environment) == shared


def test_a_task_takes_the_gpus_of_its_node_or_one_of_them():
    """JAX joins SLURM's step of one task; we are told that it is the one of its node, then one of eight."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_NTASKS": "1"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": str(free_port())}
    variables = {name: value for name, value in environment(**slurm).items() if name != "CUDA_VISIBLE_DEVICES"}
    out = subprocess.run(program("join_slurm"), cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["all", "0"]


def command(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("here:1", None, None, None), "go together: --num_processes is missing"),
        ((None, 2, 1, None), "go together: --coordinator is missing"),
        (("here", 2, 1, None), "HOST:PORT of process 0, not here"),
        (("here:1", 2, 2, None), "--process_id must be 0 to 1"),
        (("here:1", 0, 0, None), "--num_processes must be at least 1"),
        (("here:1", 1, 0, True), "leave it out beside"),
        ((None, None, None, True), "did not find one another"),
    ],
)
def test_what_does_not_go_together(arguments, said):
    with pytest.raises(UserError, match=said):
        processes.start(*arguments)


def test_one_process_starts_alone():
    processes.start(None, None, None, None)
    assert not jax.distributed.is_initialized()
    assert processes.is_first()


def test_what_differs_between_processes_is_named(monkeypatch):
    processes.check_same({"train.length": 64})  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    others = [{"a": [1, 2], "b": 1}, {"a": [1, 3], "b": 1}]
    monkeypatch.setattr(processes, "_gather", lambda said: [said, *map(json.dumps, others)])
    processes_differ = r"differ: a \(\[1, 2\] in process 0, \[1, 3\] in process 2\); start all"
    with pytest.raises(UserError, match=processes_differ):
        processes.check_same({"a": (1, 2), "b": 1})
    others[1] = {"a": [1, 2]}
    with pytest.raises(UserError, match=r"differ: b \(1 in process 0, absent in process 2\)"):
        processes.check_same({"a": (1, 2), "b": 1})
    others[1]["b"] = 1
    processes.check_same({"a": (1, 2), "b": 1})


@pytest.mark.parametrize(("shape", "leading"), [((6, 9), 0), ((3, 2, 9), 1)])
def test_a_batch_is_read_by_window_number(shape, leading):
    windows = Windows(np.arange(4000), 8, seed=1)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    batch = sharding.load_batch(windows.batch, 40, shape, mesh, leading)
    np.testing.assert_array_equal(np.asarray(batch).reshape(6, 9), windows.batch(40, 6))


def together(
    num_processes: int, devices: int, script: str, *arguments: object, last: tuple[object, ...] = (), code: int = 0
) -> list[str]:
    """Runs a command as several processes of some devices each; returns what each wrote on stderr.

    The last one has more arguments; all end with this exit code.
    """
    port = free_port()
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    running = []
    for i in range(num_processes):
        flags = [f"--coordinator=localhost:{port}", f"--num_processes={num_processes}", f"--process_id={i}"]
        more = last if i == num_processes - 1 else ()
        each = command(script, *arguments, *more, *(flags if num_processes > 1 else []))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(each, env=environment, cwd=ROOT, **pipes))
    try:
        ended = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == code for process in running), [err for _, err in ended]
    for out, _ in ended[1:]:  # Gloo's lines, of several threads, may mix anywhere: each adds these letters
        letters = collections.Counter(re.sub(r"\d", "", out))
        assert letters == collections.Counter(GLOO * out.count("[Gloo]")), out
    return [err for _, err in ended]


# -- a process that is missing, frozen or killed ---------------------------------------------------------------------


class Store:
    """What process 0 keeps for three processes."""

    def __init__(self):
        self.signs, self.answers = {}, True

    def key_value_set(self, key, value, allow_overwrite):
        assert allow_overwrite
        if not self.answers:
            raise RuntimeError("UNAVAILABLE")
        self.signs[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in self.signs.items() if key.startswith(prefix)]


@pytest.fixture
def watches(monkeypatch):
    """Three processes with a clock: pass_by(seconds, alive) lets time pass; those alive give signs each second."""
    clock, store, said = [1000.0], Store(), {0: [], 1: [], 2: []}
    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    watching = [peers.Watch(store, number, 3, 60, said[number].append) for number in range(3)]

    def pass_by(seconds, alive):
        for _ in range(seconds):
            clock[0] += 1
            for number in alive:
                watching[number].show()
                watching[number].look()

    pass_by.watching = watching
    return pass_by, store, said, clock


def test_a_process_that_ends_with_an_error_is_named_soon(watches):
    pass_by, _, said, _ = watches
    pass_by(5, [0, 1, 2])
    pass_by.watching[1].say_ended()
    pass_by(5, [0, 2])
    assert said == {0: [], 1: [], 2: []}  # an error of their own would be told first
    pass_by(5, [0, 2])
    expected = "process 1 of 3 ended with an error: see its output"
    assert {number: set(lines) for number, lines in said.items()} == {0: {expected}, 1: set(), 2: {expected}}


def test_a_process_that_gives_no_sign_of_life_is_named(watches):
    pass_by, _, said, _ = watches
    pass_by(500, [0, 1, 2])
    pass_by(60, [0, 2])
    assert said == {0: [], 1: [], 2: []}
    pass_by(2, [0, 2])  # process 0 sees a sign one turn later than process 2
    expected = "process 1 of 3 did not respond for 60 s: ended, frozen, or out of reach"
    assert {number: set(lines) for number, lines in said.items()} == {0: {expected}, 1: set(), 2: {expected}}


def test_without_process_0_nothing_is_known_of_the_others(watches):
    pass_by, store, said, _ = watches
    pass_by(5, [0, 1, 2])
    store.answers = False
    pass_by(61, [1, 2])
    assert [line.split(" did not respond")[0] for line in said[1] + said[2]] == ["process 0 of 3"] * 2


def test_a_run_that_was_frozen_as_a_whole_goes_on(watches):
    """As by a scheduler that suspends it."""
    pass_by, _, said, clock = watches
    pass_by(5, [0, 1, 2])
    clock[0] += 10_000
    for _ in range(10):
        pass_by(1, [2, 1, 0])
    assert said == {0: [], 1: [], 2: []}


def waiting(port: int, number: int, join_timeout: float) -> subprocess.Popen:
    each = program("wait_for_others", f"localhost:{port}", number, join_timeout)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(each, cwd=ROOT, env=environment(), **pipes)


def test_a_relay_stays_open_when_the_other_side_is_reset():
    """JAX's client, which goes on sending, would end the process if its connection were closed."""
    with socket.create_server(("localhost", 0)) as server:
        host, port = peers.relay(f"localhost:{server.getsockname()[1]}").split(":")
        with socket.create_connection((host, int(port))) as client:
            far, _ = server.accept()
            client.sendall(b"first")
            assert far.recv(100) == b"first"
            far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as by SIGKILL
            far.close()
            client.settimeout(0.2)
            for _ in range(10):
                client.sendall(b"more")
                with pytest.raises(TimeoutError):
                    client.recv(1)


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_does_not_come_is_one_line(number):
    with waiting(free_port(), number, 2) as process:
        out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert err.strip() == "error: not all processes of this run came within 2 s; --join_timeout waits longer"


@pytest.mark.parametrize(
    ("signum", "number"),
    [
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_gone_is_one_line(signum, number):
    port = free_port()
    with waiting(port, 0, 100) as first, waiting(port, 1, 100) as second:
        both = (first, second)
        try:
            assert [process.stdout.readline() for process in both] == ["up\n"] * 2
            both[number].send_signal(signum)
            _, err = both[1 - number].communicate(timeout=100)
        finally:
            for process in both:
                process.kill()
    assert both[1 - number].returncode == 2, err
    assert err.strip() == f"error: process {number} of 2 did not respond for 8 s: ended, frozen, or out of reach"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("number", [0, 1])
def test_a_run_that_loses_a_process_ends_with_one_line(text_files, tmp_path, signum, number):
    """Where a sum over processes fails at once, and where it never ends."""
    flags = [*flags_of(text_files, tmp_path), f"--workdir={tmp_path}/run", "--config.train.steps=1000000"]
    flags += ["--config.checkpoint.every=1000000", "--config.eval.every=0", "--peer_timeout=20"]
    flags += [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command("train.py", *flags, f"--process_id={i}"), cwd=ROOT, **pipes) for i in (0, 1)]
    try:
        while not read_metrics(tmp_path / "run"):
            assert both[0].poll() is both[1].poll() is None
            time.sleep(0.1)
        both[number].send_signal(signum)
        _, err = both[1 - number].communicate(timeout=200)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1 - number].returncode == 2, err
    line = f"error: process {number} of 2 did not respond for 20 s: ended, frozen, or out of reach"
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("timeouts", "said"), [((0, 60), "--join_timeout must be at least 1"), ((60, 0.5), "--peer_timeout must be at")]
)
def test_timeouts_that_are_too_short(timeouts, said):
    with pytest.raises(UserError, match=said):
        processes.start("here:1", 2, 1, None, *timeouts)


def losses(workdir) -> np.ndarray:
    metrics = read_metrics(workdir)
    assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
    return np.array([line["loss"] for line in metrics])


def flags_of(text_files, tmp_path) -> list[str]:
    return [
        f"--config={ROOT}/configs/smoke.py:wavelet",
        "--config.data.source=text",
        f"--config.data.train_files={text_files}/*.txt",
        "--config.data.validation_fraction=0.2",
        f"--config.data.cache_dir={tmp_path}/cache",
        "--config.log.every=1",
    ]


@pytest.mark.slow
def test_processes_that_differ_do_not_train(text_files, tmp_path):
    """In the config and in the text; where each keeps its cache is its own."""
    flags = [*flags_of(text_files, tmp_path), f"--workdir={tmp_path}/run"]
    last = ("--config.optimizer.learning_rate=0.5", f"--config.data.train_files={text_files}/[0-4]*.txt")
    last += (f"--config.data.cache_dir={tmp_path}/own",)
    for said in together(2, 1, "train.py", *flags, last=last, code=2):
        line = next(line for line in said.splitlines() if line.startswith("error: "))
        assert "run differ: optimizer.learning_rate (0.002 in process 0, 0.5 in process 1), the corpus (" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_are_one_run(text_files, tmp_path):
    """Sums over devices are taken in another order: rounding, grown a little by each of 20 Adam updates."""
    flags = [
        *flags_of(text_files, tmp_path),
        "--config.mesh.fsdp=2",
        "--config.optimizer.decay_steps=20",
        "--config.train.accumulation=2",
        "--config.train.batch_size=16",
    ]
    one = [*flags, f"--workdir={tmp_path}/one", "--config.train.steps=20"]
    two = [*flags, f"--workdir={tmp_path}/two"]
    together(1, 8, "train.py", *one)
    first, second = together(2, 4, "train.py", *two, "--config.train.steps=10")
    assert "updates 0 to 10" in first
    assert not any(word in second for word in ("updates", "wavelet:", "it/s"))
    together(1, 4, "train.py", *two, "--config.train.steps=20")
    expected = losses(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), expected, rtol=2e-5)
    assert expected[-1] < 0.9 * expected[0]

    tables = []
    for count, devices in ((1, 1), (2, 2)):
        out = tmp_path / f"out{count}"
        together(count, devices, "eval.py", f"--workdir={tmp_path}/two", "--lengths=64,256", f"--out={out}")
        with (out / "extrapolation.csv").open() as file:
            tables.append([float(row["loss"]) for row in csv.DictReader(file)])
    np.testing.assert_allclose(tables[1], tables[0], rtol=1e-5)

    arguments = (f"--workdir={tmp_path}/two", "--lengths=64", f"--out={tmp_path}/none")
    for said in together(2, 1, "eval.py", *arguments, last=("--protocol=non_overlapping",), code=2):
        differ = "run differ: protocol (full_length in process 0, non_overlapping in process 1)"
        assert f"{differ}; start all with the same" in said
    assert not (tmp_path / "none").exists()
