"""Sets the results of a comparison beside the paper's numbers; see `wavelet_jax.paper.compare`.

python -m wavelet_jax.paper --results=runs/table1_small --out=runs/table1_small/paper
"""

from absl import flags

from wavelet_jax.commands import cli
from wavelet_jax.errors import UserError
from wavelet_jax.files.reading import user_path
from wavelet_jax.paper import compare

RESULTS = flags.DEFINE_multi_string("results", [], "folder with an extrapolation.csv; once for every one to compare")
OUT = flags.DEFINE_string("out", None, "folder for comparison.csv and comparison.png; none: print only")


def main() -> None:
    if not RESULTS.value:
        raise UserError("name results: --results=DIR, once or more, folders that a comparison or eval.py --out wrote")
    out = user_path(OUT.value, "--out") if OUT.value else None
    compare.compare([user_path(folder, "--results") for folder in RESULTS.value], out)


if __name__ == "__main__":
    cli.run(main)
