"""Tokens per second of a whole train step, against x-transformers in PyTorch, and the share of attention.

    python benchmarks/train_step.py                                                       the quickstart model
    python benchmarks/train_step.py --length=2048 --batch=1 --heads=4 --head_dim=128 --d_model=512 --rounds=10

A step is forward, backward, clipping and AdamW, in float32, on tokens that lie on the device already. All cases take
turns in one process, every one once a round (benchmarks/measure.py); quoted are medians over rounds [quartiles]. The
command keeps freed memory from the operating system for both sides (wavelet_jax/commands/cli.py).

Shares are by ablation, in the same turns, since a fused program has no line between attention and the rest:

  position term  1 - t(nope) / t(method): the same step with an empty `Terms`.
  attention      1 - t(no attention) / t(method): the same step of nope with query + key + value in attention's place,
                 so the scores, softmax, weighted sum and position term, forward and backward; not the four projections.

x-transformers' step is of the same arithmetic (benchmarks/steps.py says how near) and takes positions by RoPE or ALiBi;
it has no wavelets, so a method that it lacks is set against its RoPE. Without PyTorch and x-transformers
(`pip install -e '.[bench]'`) its cases are left out, which the output says.
"""

import os
import sys
from pathlib import Path

import numpy as np
from absl import flags

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch has to find room on the same accelerator
sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ and configs/ are not installed

from benchmarks import measure, steps
from configs import default, quickstart
from wavelet_jax import positions
from wavelet_jax.commands import cli
from wavelet_jax.data.tokenizers import Byte
from wavelet_jax.errors import UserError, unknown
from wavelet_jax.files.reading import user_path
from wavelet_jax.runs import directory

METHODS = flags.DEFINE_list("methods", ["wavelet", "rope", "alibi"], "ours; nope, the base of the shares, is added")
LAYERS = flags.DEFINE_integer("layers", 4, "blocks")
D_MODEL = flags.DEFINE_integer("d_model", 128, "width of the residual stream")
HEADS = flags.DEFINE_integer("heads", 4, "heads of queries, keys and values")
HEAD_DIM = flags.DEFINE_integer("head_dim", 32, "size of a head")
D_FF = flags.DEFINE_integer("d_ff", 0, "width inside the feed-forward; 0: 8/3 of d_model, up to a multiple of 8")
LENGTH = flags.DEFINE_integer("length", 128, "tokens of a window")
BATCH = flags.DEFINE_integer("batch", 16, "windows of a step")
VOCAB = flags.DEFINE_integer("vocab", 0, "words; 0: those of the byte tokenizer")
BACKEND = flags.DEFINE_string("backend", "auto", "of our attention: auto, or one of wavelet_jax.attention.BACKENDS")
X_TRANSFORMERS = flags.DEFINE_list("x_transformers", ["rope", "alibi"], "its methods to measure; empty: none")
TORCH_COMPILE = flags.DEFINE_bool("torch_compile", False, "x-transformers' model through torch.compile")
ROUNDS = flags.DEFINE_integer("rounds", 30, "turns of every case")
OUT = flags.DEFINE_string("out", str(Path(__file__).parent / "results" / "train_step.json"), "the results; .png beside")

NO_ATTENTION, PEER = "no attention", "x-transformers "


def main() -> None:
    out = user_path(OUT.value, "--out")
    _check(out)
    environment = measure.environment()  # first, so that its load average is that of others
    vocab_size = VOCAB.value or Byte.vocab_size
    tokens_BxL1 = np.random.default_rng(0).integers(vocab_size, size=(BATCH.value, LENGTH.value + 1))
    cases = {
        method: steps.ours(_config(method), vocab_size, tokens_BxL1)
        for method in dict.fromkeys([*METHODS.value, "nope"])
    }
    cases[NO_ATTENTION] = steps.ours(_config("nope"), vocab_size, tokens_BxL1, attend=False)
    left_out = "not asked for" if not X_TRANSFORMERS.value else steps.x_transformers_obstacle()
    if left_out is None:
        for method in X_TRANSFORMERS.value:
            cases[PEER + method] = steps.x_transformers(
                _config(method), method, vocab_size, tokens_BxL1, compiled=TORCH_COMPILE.value
            )

    times = measure.in_turn({name: case.run for name, case in cases.items()}, ROUNDS.value)
    wrong = [name for name, case in cases.items() if not np.isfinite(case.loss())]
    if wrong:
        raise UserError(f"the loss of {', '.join(wrong)} is not finite, and its time means nothing: try fewer --rounds")

    results = {
        "environment": environment,
        "shape": {
            **{flag.name: flag.value for flag in (LAYERS, D_MODEL, HEADS, HEAD_DIM, LENGTH, BATCH)},
            "d_ff": _d_ff(),
            "vocab": vocab_size,
            "dtype": "float32",
        },
        "backend": BACKEND.value,
        "torch_compile": TORCH_COMPILE.value,
        "x_transformers_left_out": left_out,
        "parameters": {name: case.parameters for name, case in cases.items()},
        "summary": summarise(times, BATCH.value * LENGTH.value),
        "seconds_in_rounds": times,
    }
    measure.write_results(out, results)
    draw(results, out.with_suffix(".png"))
    print(table(results))
    if left_out is not None:
        print(f"x-transformers is left out: {left_out}")
    print(f"{out}, {out.with_suffix('.png')}")


def summarise(times: dict[str, np.ndarray], tokens: int) -> dict[str, dict]:
    """For every case its tokens per second, shares and time over x-transformers', as (quartile, median, quartile).

    Args:
      times: {case: seconds [rounds]}, with "nope" and "no attention".
      tokens: of a step.
    """
    summary = {}
    for name, seconds in times.items():
        row = summary[name] = {"tokens_per_second": measure.quartiles(tokens / seconds)}
        if name.startswith(PEER):
            continue
        if name != NO_ATTENTION:
            row["attention_share"] = measure.quartiles(1 - times[NO_ATTENTION] / seconds)
            row["position_share"] = measure.quartiles(1 - times["nope"] / seconds)
        against = [PEER + method for method in (name, "rope") if PEER + method in times]
        if against and name != NO_ATTENTION:
            row["against"] = against[0]
            row["over_x_transformers"] = measure.ratios(times, against[0])[name]
    return summary


def table(results: dict) -> str:
    """The summary for people: one line per case."""
    header = ("", "parameters", "tokens/s", "ms per step", "time over x-transformers", "attention", "position term")
    rows = [header]
    for name, row in results["summary"].items():
        over = f"{_spread(row['over_x_transformers'], '.2f')} ({row['against']})" if "against" in row else ""
        shares = [_spread(row[share], ".0%") if share in row else "" for share in ("attention_share", "position_share")]
        rows.append(
            (
                name,
                f"{results['parameters'][name]:,}",
                _spread(row["tokens_per_second"], ",.0f"),
                _spread(measure.quartiles(1000 * results["seconds_in_rounds"][name]), ",.1f"),
                over.replace(f"({PEER}", "("),
                *shares,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def draw(results: dict, path: Path) -> None:
    """One bar per case: the median time of a step, ours in parts; whiskers are quartiles."""
    from wavelet_jax.figures import style  # matplotlib takes a second to import, and bad input should not wait for it

    times, shape, environment = results["seconds_in_rounds"], results["shape"], results["environment"]
    spread = {name: np.array(measure.quartiles(1000 * seconds)) for name, seconds in times.items()}
    rest, nope = spread[NO_ATTENTION][1], spread["nope"][1]
    names = [name for name in times if name != NO_ATTENTION]
    figure, axes = style.plt.subplots(figsize=(7.5, 1.6 + 0.45 * len(names)), dpi=120, layout="constrained")
    parts = {
        "all but attention": style.COLORS[5],
        "attention": style.COLORS[0],
        "position term": style.COLORS[1],
    }
    for i, name in enumerate(names):
        low, middle, high = spread[name]
        if name.startswith(PEER):
            axes.barh(i, middle, color=style.COLORS[7], label=f"{PEER.strip()} (PyTorch)")
        else:
            edges = np.clip([0, rest, nope, middle], 0, middle)  # noise may put a part's end past the whole
            for part, left, right in zip(parts, edges, edges[1:], strict=False):
                axes.barh(i, right - left, left=left, color=parts[part], label=part)
        axes.errorbar(middle, i, xerr=[[middle - low], [high - middle]], color="black", lw=1, capsize=3)
        speed = results["summary"][name]["tokens_per_second"][1]
        axes.annotate(f"{speed:,.0f} tokens/s", (high, i), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(high for _, _, high in spread.values()))
    axes.set_xlabel("a train step (ms): median and quartiles")
    axes.set_title("A whole train step and its parts")
    axes.grid(alpha=0.25, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=len(once), frameon=False, fontsize=8)
    figure.supxlabel(
        f"{shape['layers']} layers of {shape['d_model']}, {shape['heads']} heads of {shape['head_dim']}, "
        f"{shape['batch']} x {shape['length']} tokens, {shape['vocab']:,} words, {shape['dtype']}; "
        f"{len(times['nope'])} rounds in turn\n"
        f"{environment['device']}, {environment['cpu']}, {environment['threads']} threads",
        fontsize=7,
        color="0.4",
    )
    figure.savefig(path, bbox_inches="tight")
    style.plt.close(figure)


def _config(method: str):
    """configs/quickstart.py at the shape of the flags."""
    config = quickstart.get_config(method)
    config.model.update(num_layers=LAYERS.value, d_model=D_MODEL.value, head_dim=HEAD_DIM.value, d_ff=_d_ff())
    config.model.update(num_heads=HEADS.value, num_kv_heads=HEADS.value, attention_backend=BACKEND.value)
    config.train.update(length=LENGTH.value, batch_size=BATCH.value)
    default.set_position(config, max_positions=max(2048, LENGTH.value))
    return config


def _d_ff() -> int:
    return D_FF.value or -(-D_MODEL.value // 3) * 8  # 344 of 128, as wavelet_jax/config/default.py has it


def _check(out: Path) -> None:
    """Raises `UserError` for flags that cannot be met, before anything is imported or compiled for them."""
    sizes = (LAYERS, D_MODEL, HEADS, HEAD_DIM, LENGTH, BATCH, ROUNDS)
    directory.check_least({f"--{flag.name}": (flag.value, 1) for flag in sizes})
    directory.check_least({f"--{flag.name}": (flag.value, 0) for flag in (D_FF, VOCAB)})
    if not METHODS.value:
        raise UserError(f"--methods takes names of methods: {', '.join(positions.METHODS)}")
    for flag, allowed in ((METHODS, positions.METHODS), (X_TRANSFORMERS, steps.X_TRANSFORMERS_METHODS)):
        for method in flag.value:
            if method not in allowed:
                raise unknown(f"method of --{flag.name}", method, allowed)
        if len(set(flag.value)) < len(flag.value):
            raise UserError(f"--{flag.name} names a method twice: {', '.join(flag.value)}")
    if out.suffix != ".json":
        raise UserError(f"--out takes the name of a .json file, not {out}")
    directory.check_folder(out.parent)


def _spread(quartiles: tuple[float, float, float], form: str) -> str:
    low, middle, high = (format(value, form) for value in quartiles)
    return f"{middle} [{low}, {high}]"


if __name__ == "__main__":
    cli.run(main)
