"""Table 4: discrete wavelets, by PyWavelets (A.14): levels 1 .. 8 in the place of the scales, shifts 0 .. 15.

    python train.py --config=configs/paper/table4.py:rbio1.1 --workdir=DIR
    python train.py --config=configs/paper/table4.py:small --workdir=DIR

The model, text and training are those of configs/paper/table1.py at L_train 512: see there for the data and for
the compute, which each row takes. Expected perplexity at full length, the paper's, at 512, 1,012 and 2,512 tokens
(and on top, from Table 3):

    ricker     19.19   18.23   17.99    haar       19.27   18.34   18.17
    db2        20.64   30.30  130.93    dmey       25.45   25.88  131.48    bior5.5    21.72   23.43   36.30
    db4        21.37   41.78   56.18    bior1.3    23.69   23.38   88.66    bior6.8    21.21   21.10   46.97
    db8        21.58   26.90   39.75    bior2.2    21.59   29.71   50.25    rbio1.1    19.69   18.79   18.98
    db16       21.24   21.15   46.65    bior2.6    21.60   22.15   40.61    rbio1.3    21.39   52.06   59.94
    db32       21.14   21.20   38.00    bior3.1    22.38   59.30  205.54    rbio2.2    21.98   68.57   93.90
    sym2       20.68   31.25  126.32    bior3.5    21.65   27.41   53.99    rbio2.6    21.60   24.54   44.57
    sym4       21.98   24.70   42.81    bior3.9    21.51   21.89   50.14
    sym8       24.63   23.97   92.36    bior4.4    21.64   21.67   51.46
    coif1      26.24   64.62   97.60
    coif2      21.39   27.74   44.26
    coif4      42.42   41.07  110.27
    coif8      21.26   21.31   35.73
    coif16    113.42  132.14  230.95

Variants: a row by its wavelet; after it `_fine`, `_centre` and `_n-m`, in this order, for the other readings of what
the paper leaves open (wavelet_jax/wavelets/discrete.py has them all); `small_` before it takes table1's small model on
WikiText-2, with levels 1 .. 8 and a quarter of the shifts, since its heads are of 32. With no variant all rows are
trained one after another and drawn, and with `small` five of the small ones.
"""

from ml_collections import ConfigDict

from configs.paper import table1
from wavelet_jax.errors import unknown
from wavelet_jax.wavelets.discrete import TABLE_4

ROWS = TABLE_4
SMALL = ("small_rbio1.1", "small_db2", "small_db8", "small_coif2", "small_bior3.1")


def get_config(variant: str = "") -> ConfigDict:
    size = "small_" if variant.startswith("small") else ""
    config = table1.get_config(f"{size}discrete_wavelet")
    if variant in ("", "small"):
        config.compare.variants = SMALL if variant else ROWS
        config.compare.label = ""
        return config
    config.compare.label = row = variant.removeprefix("small_")
    for suffix, change in (
        ("_n-m", {"t_sign": "n-m"}),
        ("_centre", {"origin": "centre"}),
        ("_fine", {"sampling": "fine"}),
    ):
        if row.endswith(suffix):
            row = row.removesuffix(suffix)
            config.position.update(change)
    if row not in ROWS:
        raise unknown("row of Table 4", row, ROWS)
    config.position.wavelet = row
    return config
