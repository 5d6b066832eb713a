"""Which parts of the package may import which, and what importing it costs."""

import ast
import subprocess
import sys

from support.project import ROOT, environment

PACKAGE = ROOT / "wavelet_jax"
# From the bottom up: a part imports only parts of lines above its own, and itself.
LEVELS = (
    ("errors", "version"),
    ("integers", "ranges", "concrete"),
    ("angles", "files", "hardware"),
    ("wavelets",),
    ("positions",),
    ("attention",),
    ("parallel",),
    ("config",),
    ("commands", "model", "interop"),
    ("data", "runs"),
    ("training",),
    ("figures",),
    ("evaluation",),
    ("analysis", "paper", "studies"),
)
# What can be taken into other people's models imports nothing that belongs to ours.
TAKEN_AWAY = {"wavelets", "positions", "attention", "interop"}
OURS = {"config", "commands", "model", "data", "runs", "training"}
FLAGS = {"commands/cli.py"}  # beside the commands themselves


def imported(path) -> set[str]:
    """The parts of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "wavelet_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("wavelet_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {parts[1] for parts in names if parts[0] == "wavelet_jax" and len(parts) > 1}
    return found


def arrows() -> dict[str, set[str]]:
    """{part: the other parts that it imports}."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            found.setdefault(part, set()).update(imported(path) - {part})
    return found


def test_parts_import_only_what_is_below_them():
    level = {part: number for number, parts in enumerate(LEVELS) for part in parts}
    found = arrows()
    assert found.keys() == level.keys()
    upward = {(part, other) for part, others in found.items() for other in others if level[other] >= level[part]}
    assert upward == set()


def test_what_others_take_needs_nothing_of_ours():
    found = arrows()
    reached, waiting = set(), list(TAKEN_AWAY)
    while waiting:
        part = waiting.pop()
        reached.add(part)
        waiting += found[part] - reached
    assert reached & OURS == set()


def test_only_commands_define_flags():
    """A library that defines flags when it is imported changes the command line of every program that uses it."""
    defining = set()
    for path in PACKAGE.rglob("*.py"):
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        if any(isinstance(call, ast.Attribute) and call.attr.startswith("DEFINE_") for call in calls):
            defining.add(str(path.relative_to(PACKAGE)))
    assert {path for path in defining if not path.endswith("__main__.py")} == FLAGS


def test_the_package_imports_little():
    """Matplotlib, TFDS and Orbax take seconds to import: none of them comes with positions and attention."""
    code = "import sys, wavelet_jax, wavelet_jax.attention, wavelet_jax.positions; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    heavy = {"matplotlib", "tensorflow_datasets", "orbax", "grain", "tokenizers", "tensorboardX", "flax", "optax"}
    assert heavy & set(out.stdout.split()) == set()
