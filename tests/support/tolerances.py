"""Bounds on rounding errors of attention that several test files share, with their derivations."""

# For conformance's calls of at most 10 queries and keys with head size D = 16, numbers of unit normals. Scores are
# float32 sums of 3 D = 48 products that add up to about 4 / sqrt(D); each addition rounds by 2^-25 of the sum so far on
# average, and random signs make that sqrt(48) * 2^-25 * 2 = 4e-7; the method's own vectors add 1e-7. A softmax turns
# scores wrong by e into outputs wrong by 2 e max|v| at most, and |v| < 5: 5e-6. (Measured: 1.1e-6.)
OUTPUT = 5e-6
# The same roundings in gradients, relative to the norm of all of a gradient, where each number's error counts less
# (measured: 3.4e-7); see `test_agrees_with_the_slow_loop`.
GRADIENT = 2e-6
# "tiled" keeps no weights: it has a row's sum of w dw from its output, dO . out (Dao et al., arXiv 2205.14135, Alg. 4),
# whose rounding is not that of the terms it is subtracted from. The derivatives by a row's scores then add up not to 0
# but to about 2^-24 |dO| |out| = 6e-8 * 4 * 4 = 1e-6, and what a row's scores share is no longer cancelled. That is
# small beside a gradient, but for transformer_xl's position vectors of norm 12, over sqrt(D), in 56 rows of random
# signs: 1e-6 * 3 * sqrt(56) = 2.2e-5 beside 6.1, or 3.7e-6; with GRADIENT, 4.2e-6. (Measured: 1.4e-6, and 0.9e-6 with
# the sum of w dw itself.)
SHARED_BY_KEYS = 4.2e-6

# Sums of a few hundred products of unit normals in float32, in another order.
FLOAT32 = 3e-6
