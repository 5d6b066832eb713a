"""Table 3: scales against shifts. Ten grids for Ricker and for Gaussian, then Haar and Morlet (A.13, 6.3.1).

    python train.py --config=configs/paper/table3.py:ricker_2^0..2^7 --workdir=DIR
    python train.py --config=configs/paper/table3.py:small --workdir=DIR

The model, text and training are those of configs/paper/table1.py at L_train 512: see there for the data and for
the compute, which each row takes. Expected perplexity at full length, the paper's:

    variant                shifts        512    1012    2512        variant                 512    1012    2512
    ricker_2^0..2^7        0 .. 15     19.19   18.23   17.99        gaussian_2^0..2^7     19.30   18.31   17.88
    ricker_2^1..2^8        0 .. 15     19.25   18.23   18.02        gaussian_2^1..2^8     19.41   18.41   18.01
    ricker_2^2..2^9        0 .. 15     19.40   18.41   18.07        gaussian_2^2..2^9     19.46   18.43   17.93
    ricker_2^0..2^3        0 .. 31     19.55   18.87   21.73        gaussian_2^0..2^3     19.33   18.43   18.94
    ricker_2^0..2^1        0 .. 63     19.95   20.90   70.80        gaussian_2^0..2^1     19.70   18.96   23.14
    ricker_2^0..2^15       0 .. 7      19.24   18.22   17.84        gaussian_2^0..2^15    19.24   18.24   17.77
    ricker_2^0..2^31       0 .. 3      19.26   18.24   17.84        gaussian_2^0..2^31    19.29   18.30   17.85
    ricker_2^0..2^63       0 .. 1      19.30   18.31   18.02        gaussian_2^0..2^63    19.37   18.46   18.10
    ricker_2^0..2^127      0           19.46   18.50   18.29        gaussian_2^0..2^127   19.68   18.71   18.45
    ricker_2^7             0 .. 127    19.80   20.68   21.31        gaussian_2^7          20.05   19.53   35.23
    haar_2^0 (fixed scale) not stated  20.49   51.61  299.26        haar_2^0..2^7         19.27   18.34   18.17
                                                                    morlet_2^0..2^7       19.65   19.02   26.56

Variants: a row by its name, wavelet and scales; `_n-m` after it takes the other sign of t (footnote 8; the default is
Eq. 14's, m - n); `small_` before it takes table1's small model on WikiText-2. With no variant all rows are trained
one after another and drawn, with `small` eight of the small ones, and with
`--config.compare.variants="('small_haar_2^0', ..)"` any others.

What the paper leaves open. Haar: with t = m - n it is the textbook's, +1 on [0, 0.5) and -1 on [0.5, 1); with n - m
it is Eq. (15)'s. Fixed scale is read as 6.3.1 says it, a in {2^0, 2^0, .., 2^0} with the shifts of the other rows: 16
different columns, each 8 times; `haar_2^0_shifts0..127` takes as many shifts as dimensions. With n - m a fixed-scale
Haar tells distances 0 and 1 from each other and from all others, and no more.

Small models have heads of 32, not of 128. A row keeps its scales there, and a quarter of its shifts; where that is
less than one (2^0..2^63, 2^0..2^127), there is shift 0 alone, and every 2nd or 4th of the scales. So every grid has a
quarter of the paper's wavelets, and reaches as far. (Scales and shifts in the same ratio as the paper's would leave
the first row scales to 2^3 only, and the last ones nothing to tell them apart.)
"""

from ml_collections import ConfigDict

from configs.paper import table1
from wavelet_jax.errors import unknown

# Scales of a grid -> (their number, the first one's exponent). The shifts fill the head: head_dim over that number.
GRIDS = {
    "2^0..2^7": (8, 0),
    "2^1..2^8": (8, 1),
    "2^2..2^9": (8, 2),
    "2^0..2^3": (4, 0),
    "2^0..2^1": (2, 0),
    "2^0..2^15": (16, 0),
    "2^0..2^31": (32, 0),
    "2^0..2^63": (64, 0),
    "2^0..2^127": (128, 0),
    "2^7": (1, 7),
}
# Named by wavelet and scales, as they stand in the paper's table.
ROWS = (
    *(f"{mother}_{scales}" for mother in ("ricker", "gaussian") for scales in GRIDS),
    *("haar_2^0", "haar_2^0..2^7", "morlet_2^0..2^7"),
)
OTHER_ROWS = ("haar_2^0_shifts0..127",)
SMALL = (
    *(
        f"small_ricker_{scales}"
        for scales in ("2^0..2^7", "2^2..2^9", "2^0..2^3", "2^0..2^1", "2^0..2^31", "2^0..2^127")
    ),
    *("small_ricker_2^7", "small_haar_2^0"),
)


def get_config(variant: str = "") -> ConfigDict:
    size = "small_" if variant.startswith("small") else ""
    config = table1.get_config(f"{size}wavelet")
    if variant in ("", "small"):
        config.compare.variants = SMALL if variant else ROWS
        config.compare.label = ""
        return config
    label = variant.removeprefix("small_")
    row = label.removesuffix("_n-m")
    if row not in (*ROWS, *OTHER_ROWS):
        raise unknown("row of Table 3", row, (*ROWS, *OTHER_ROWS))
    mother, scales = row.split("_", 1)
    config.position.t_sign = "n-m" if label != row else "m-n"
    config.position.mother = "haar_standard" if mother == "haar" and label == row else mother
    head_dim = config.model.head_dim
    if row == "haar_2^0":  # the eight scales all 2^0
        config.position.scales = (1.0,) * head_dim
        config.position.shifts = tuple(float(shift) for shift in range(head_dim // 8)) * 8
    elif row == "haar_2^0_shifts0..127":
        config.position.num_scales = 1
    else:
        count, first = GRIDS[scales]
        if count <= head_dim:
            config.position.update(num_scales=count, first_exponent=first)
        else:  # more scales than dimensions: so many of them, evenly, and shift 0
            config.position.scales = tuple(2.0**e for e in range(first, first + count, count // head_dim))
            config.position.shifts = (0.0,) * head_dim
    config.compare.label = label
    return config
