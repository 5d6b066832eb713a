"""The benchmarks' measuring, held to fake cases, and a tiny run. Times of ours are not checked: here they are noise."""

import json
import time

import numpy as np
import pytest

from benchmarks import measure
from wavelet_jax.errors import UserError


def fake_cases(calls: list[str]) -> dict:
    return {name: lambda name=name: calls.append(name) for name in ("a", "b", "c", "d")}


def test_every_case_runs_once_a_round_after_its_warmups():
    calls = []
    times = measure.in_turn(fake_cases(calls), rounds=8, warmups=3)
    assert sorted(calls[:12]) == sorted("abcd" * 3)
    turns = [tuple(calls[start : start + 4]) for start in range(12, len(calls), 4)]
    assert len(turns) == 8
    assert all(sorted(turn) == list("abcd") for turn in turns)
    assert len(set(turns)) > 4, "the order must change: else a case always follows the same one"
    assert {name: seconds.shape for name, seconds in times.items()} == dict.fromkeys("abcd", (8,))


def test_time_goes_to_the_case_that_took_it():
    times = measure.in_turn({"still": lambda: None, "sleeps": lambda: time.sleep(0.02)}, rounds=3, warmups=0)
    assert (times["sleeps"] >= 0.02).all()
    assert np.median(times["still"]) < 0.01


def test_ratios_are_taken_round_by_round():
    # A machine that gets slower: each round's ratio is 2, 3, 4, while the ratio of medians is 30 / 100.
    times = {"base": np.array([1.0, 100.0, 1000.0]), "case": np.array([2.0, 300.0, 4000.0])}
    assert measure.ratios(times, "base") == {"base": (1.0, 1.0, 1.0), "case": (2.5, 3.0, 3.5)}
    with pytest.raises(UserError, match="did you mean 'base'"):
        measure.ratios(times, "bass")


@pytest.mark.parametrize(
    ("cases", "rounds", "said"), [({}, 1, "no case"), ({"a": lambda: None}, 0, "rounds must be at least 1, not 0")]
)
def test_nothing_to_measure_is_said(cases, rounds, said):
    with pytest.raises(UserError, match=said):
        measure.in_turn(cases, rounds)


def test_results_come_back_from_their_file(tmp_path):
    path = tmp_path / "new" / "results.json"
    times = np.array([0.5, 0.25])
    measure.write_results(path, {"environment": measure.environment(), "times": {"a": times, "n": np.float32(2)}})
    back = json.loads(path.read_text())
    assert back["times"] == {"a": [0.5, 0.25], "n": 2.0}
    assert back["environment"].keys() >= {"device", "cpu", "threads", "versions", "date", "command"}
    assert back["environment"]["versions"].keys() >= {"jax", "jaxlib", "flax", "numpy"}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
