"""Command lines that cannot be parsed: one line that names the fault, what is allowed, and the nearest name."""

import json
import re

import pytest
from support.project import ROOT, program, run

SMOKE = f"--config={ROOT}/configs/smoke.py:rope"
FILES = {
    "syntax": "def get_config(x)\n    return x",
    "raises": 'def get_config():\n    raise ValueError("two\\nlines")\n',
    "nothing": "x = 1\n",
    "imports": "\nimport no_such_module\n",
    "none": "def get_config():\n    pass\n",
    "foreign": (
        "from configs import default\ndef get_config():\n    config = default.get_config('alibi')\n"
        "    config.position.theta = 3.0\n    return config\n"
    ),
    "alone": "def get_config():\n    return 1\n",
}
# (arguments, what is said); FOLDER is that of the files above.
CASES = [
    (
        [SMOKE, "--config.train.stepz=2"],
        "unknown config key 'train.stepz': did you mean 'train.steps'? train has accum.*",
    ),
    ([SMOKE, "--config.trian.steps=2"], "unknown config key 'trian.steps': did you mean 'train.steps'?"),
    ([SMOKE, "--config.steps=2"], "unknown config key 'steps': did you mean 'train.steps'?"),
    ([SMOKE, "--config.zzz.qqq=2"], "unknown config key 'zzz.qqq': its sections are .*train.*"),
    ([SMOKE, "--config.train.steps.x=2"], "unknown config key 'train.steps.x': did you mean 'train.steps'?"),
    ([SMOKE, "--config.position.teta=2"], "unknown config key 'position.teta': did you mean 'position.theta'?.*"),
    ([SMOKE, "--config.train=2"], "--config.train is a section, not a key: set train.accumulation, .*"),
    ([SMOKE, "--config.train.steps=many"], "--config.train.steps=many: it takes a whole number"),
    ([SMOKE, "--config.train.steps=2.5"], "--config.train.steps=2.5: it takes a whole number"),
    ([SMOKE, "--config.train.steps="], "--config.train.steps=: it takes a whole number"),
    ([SMOKE, "--config.train.steps", "many"], "--config.train.steps=many: it takes a whole number"),
    ([SMOKE, "--config.train.steps"], "--config.train.steps has no value: flags are written --name=value"),
    ([SMOKE, "--noconfig.train.steps"], "--noconfig.train.steps: only a switch can be negated, and train.steps .*"),
    ([SMOKE, "--config.optimizer.learning_rate=fast"], "--config.optimizer.learning_rate=fast: it takes a number"),
    ([SMOKE, "--config.model.tied_head=maybe"], "--config.model.tied_head=maybe: it takes true or false"),
    (
        [SMOKE, "--config.compare.lengths=(64,"],
        r"--config.compare.lengths=\(64,: it takes a tuple, such as \(64, 128\)",
    ),
    (["--config.train.steps=3", SMOKE], f"{SMOKE} must come before --config.train.steps=3"),
    (["--config=no/such.py"], "there is no config file no/such.py"),
    (["--config=no/such.py", "--config.train.steps=3"], "there is no config file no/such.py"),
    (["--config=FOLDER"], "there is no config file FOLDER: it is a folder"),
    (["--config="], "--config is empty: it takes FILE.py or FILE.py:VARIANT"),
    (["--config=FOLDER/syntax.py"], r"the config file FOLDER/syntax.py is not Python: expected ':' \(line 1\)"),
    (["--config=FOLDER/raises.py"], "the config file FOLDER/raises.py, line 2: ValueError: two lines"),
    (["--config=FOLDER/nothing.py"], "the config file FOLDER/nothing.py defines no function get_config"),
    (
        ["--config=FOLDER/imports.py"],
        "the config file FOLDER/imports.py, line 2: ModuleNotFoundError: .*no_such_module'",
    ),
    (["--config=FOLDER/none.py"], "get_config of the config file FOLDER/none.py returned NoneType, not a ConfigDict"),
    (["--config=FOLDER/alone.py:x"], r"the config file FOLDER/alone.py: TypeError: get_config\(\) takes 0 .*"),
    (["--config=FOLDER/alone.py"], "get_config of the config file FOLDER/alone.py returned int, not a ConfigDict"),
    ([SMOKE.replace("rope", "roppe")], "unknown position method 'roppe': did you mean 'rope'?.*"),
    ([SMOKE, "--config.position.theta=1"], None),  # refused when the method is made
    (
        [SMOKE, "--config.position.mother=haar"],
        "mother is an option of wavelet, not of rope, whose options are theta, layout",
    ),
    (
        [SMOKE.replace("rope", "wavelet"), "--config.position.theta=3"],
        "theta is an option of rope, transformer_xl, sinusoidal, not of wavelet, whose options are mother, .*",
    ),
    ([SMOKE.replace("rope", "nope"), "--config.position.theta=3"], ".*, not of nope, which has no options"),
    (
        [SMOKE, "--config.position.method=alibi"],
        "--config.position.method: the method is chosen by the variant: --config=FILE.py:METHOD",
    ),
    (
        [SMOKE, "--config.train.seed=3"],
        r"--config.train.seed: there are two seeds, train.model_seed .* and data.seed .*",
    ),
    ([SMOKE, "--config.position.d_model=3"], "--config.position.d_model: it is always model.d_model: set that"),
    ([SMOKE, "--config.config_version=1"], "--config.config_version: it is that of this code, .*"),
    (["--config=FOLDER/foreign.py"], r".*foreign.py, line 4: .*\(theta is an option of rope, .*\)"),
    ([SMOKE, "--workdri=x"], "unknown flag --workdri: did you mean --workdir?"),
    ([SMOKE, "--qqqqqqq"], "unknown flag --qqqqqqq: --help lists those that there are"),
    ([SMOKE, "--num_processes=two"], "--num_processes=two: it takes a whole number"),
    ([SMOKE, "--compile_only=perhaps"], "--compile_only=perhaps: it takes true or false"),
    ([SMOKE, "--profile_steps"], "Missing value for flag --profile_steps"),
    ([SMOKE, "now", "then"], "unexpected arguments now then: flags are written --name=value"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_what_is_wrong_with_a_command_line(folder):
    # All by one process: starting one for each takes seconds.
    lines = [[argument.replace("FOLDER", str(folder)) for argument in arguments] for arguments, _ in CASES]
    out = run(program("parse_flags"), input=json.dumps(lines))
    assert out.returncode == 0, out.stderr
    answers = [json.loads(line) for line in out.stdout.splitlines()]
    for (arguments, expected), said in zip(CASES, answers, strict=True):
        if expected is None:
            assert said is None, (arguments, said)
        else:
            pattern = expected.replace("FOLDER", re.escape(str(folder))).replace("?", r"\?")
            assert re.fullmatch(pattern, said or ""), (arguments, said)
            assert "\n" not in said
            assert len(said) < 600
    assert out.stderr == ""
