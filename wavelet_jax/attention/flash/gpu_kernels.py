"""Flash attention on `prepared`'s arrays in Triton: one source for Ampere (mma) and Hopper (wgmma).

`triton_gpu` launches these; this file alone imports triton. Positions are counted in tokens of the padded key axis
(tiles of `prepared.Layout` times V). The key at row m's own position is `origin + m`; for the row tile i = m // U keys
come in five runs, each of one kind,

    start = origin + i U - band_before       the local band is [start, start + W)
    plain, far [start - far_before, start), near [start, start + W), far [start + W, start + W + far_after), plain

the last two only where not causal. A run is a loop with nothing in it that its kind does not need. Blocks of BLOCK_M
rows and BLOCK_N keys divide U and V, so that no tile mixes two kinds. Scores and sums are float32, exponentials are to
base 2, and nothing is added by atomics: two calls are equal bit for bit.

Arguments: arrays [B x heads, length, columns], contiguous (`basis` [tiles x V, R]; a part that the terms do not have is
any pointer, never read), token counts, outputs, constants. D and R are powers of two, at least 16. `prepared` has the
scores.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# A hidden score, as `prepared.MASKED`, and where a row's running maximum begins: below any score, and so far above a
# hidden one that its weight is 0 also in a row that has seen no other.
MASKED = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-1e29)


@triton.jit
def forward(
    query, key, value, near, far, basis,
    row_length, key_length, group, origin, band_before, far_before, far_after, first_key, end_key,
    out, logsumexp,
    D: tl.constexpr, U: tl.constexpr, W: tl.constexpr, R: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_FAR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_M rows of one head. out: any float; logsumexp float32, natural, +inf: saw no key."""
    head, first = _rows_of_program(row_length, BLOCK_M)
    head_row = head.to(tl.int64) * row_length + first
    key += (head // group).to(tl.int64) * key_length * D
    value += (head // group).to(tl.int64) * key_length * D
    near += head_row * W
    row = tl.arange(0, BLOCK_M)
    start, ends = _key_runs(first // U, key_length, origin, band_before, far_before, far_after, U, W, CAUSAL, HAS_NEAR)
    query_MxD = _block(query + head_row * D, 0, BLOCK_M, D)
    far_MxR = query_MxD
    if HAS_FAR:
        far_MxR = _block(far + head_row * R, 0, BLOCK_M, R)

    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sum_MxD = tl.zeros([BLOCK_M, D], tl.float32)
    for run in tl.static_range(5):
        if (HAS_FAR or run % 2 == 0) and (run == 0 or HAS_NEAR or CAUSAL) and (run < 3 or not CAUSAL):
            for n in tl.range(ends[run], ends[run + 1], BLOCK_N):
                n = tl.multiple_of(n, BLOCK_N)
                key_NxD = _block(key, n, BLOCK_N, D)
                scores = tl.dot(query_MxD, tl.trans(key_NxD), input_precision=PRECISION)
                if run % 2 == 1:
                    basis_NxR = _block(basis, _basis_row(n, start, far_before, W), BLOCK_N, R)
                    scores = tl.dot(far_MxR, tl.trans(basis_NxR), scores, input_precision=PRECISION)
                scores = _finish(
                    scores, near, row[:, None], n + tl.arange(0, BLOCK_N)[None, :], start, origin + first,
                    first_key, end_key, W, SCALE, CAUSAL, RAGGED, HAS_NEAR, run == 2,
                )  # fmt: skip
                risen = tl.maximum(highest, tl.max(scores, 1))
                weights = tl.exp2(scores - risen[:, None])
                fade = tl.exp2(highest - risen)
                total = total * fade + tl.sum(weights, 1)
                value_NxD = _block(value, n, BLOCK_N, D)
                sum_MxD = tl.dot(
                    weights.to(value_NxD.dtype), value_NxD, sum_MxD * fade[:, None], input_precision=PRECISION
                )
                highest = risen

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    _store_block(out + head_row * D, 0, sum_MxD / total[:, None], BLOCK_M, D)
    tl.store(logsumexp + head_row + row, tl.where(seen, (highest + tl.log2(total)) * LN2, float("inf")))


@triton.jit
def query_gradients(
    query, key, value, near, far, basis, d_out, logsumexp, delta,
    row_length, key_length, group, origin, band_before, far_before, far_after, first_key, end_key,
    d_query, d_near, d_far,
    D: tl.constexpr, U: tl.constexpr, W: tl.constexpr, R: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_FAR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_M rows of one head. delta: [B x H, T], sum over D of d_out out. Gradients are float32."""
    head, first = _rows_of_program(row_length, BLOCK_M)
    head_row = head.to(tl.int64) * row_length + first
    key += (head // group).to(tl.int64) * key_length * D
    value += (head // group).to(tl.int64) * key_length * D
    near += head_row * W
    d_near += head_row * W
    row = tl.arange(0, BLOCK_M)
    start, ends = _key_runs(first // U, key_length, origin, band_before, far_before, far_after, U, W, CAUSAL, HAS_NEAR)
    query_MxD = _block(query + head_row * D, 0, BLOCK_M, D)
    d_out_MxD = _block(d_out + head_row * D, 0, BLOCK_M, D)
    logsumexp_M = tl.load(logsumexp + head_row + row) * LOG2E
    delta_M = tl.load(delta + head_row + row)
    far_MxR = query_MxD
    if HAS_FAR:
        far_MxR = _block(far + head_row * R, 0, BLOCK_M, R)

    d_query_MxD = tl.zeros([BLOCK_M, D], tl.float32)
    d_far_MxR = tl.zeros([BLOCK_M, R], tl.float32)
    for run in tl.static_range(5):
        if (HAS_FAR or run % 2 == 0) and (run == 0 or HAS_NEAR or CAUSAL) and (run < 3 or not CAUSAL):
            for n in tl.range(ends[run], ends[run + 1], BLOCK_N):
                n = tl.multiple_of(n, BLOCK_N)
                keys = n + tl.arange(0, BLOCK_N)[None, :]
                key_NxD = _block(key, n, BLOCK_N, D)
                value_NxD = _block(value, n, BLOCK_N, D)
                scores = tl.dot(query_MxD, tl.trans(key_NxD), input_precision=PRECISION)
                if run % 2 == 1:
                    basis_NxR = _block(basis, _basis_row(n, start, far_before, W), BLOCK_N, R)
                    scores = tl.dot(far_MxR, tl.trans(basis_NxR), scores, input_precision=PRECISION)
                scores = _finish(
                    scores, near, row[:, None], keys, start, origin + first,
                    first_key, end_key, W, SCALE, CAUSAL, RAGGED, HAS_NEAR, run == 2,
                )  # fmt: skip
                weights = tl.exp2(scores - logsumexp_M[:, None])
                d_weights = tl.dot(d_out_MxD, tl.trans(value_NxD), input_precision=PRECISION)
                d_scores = weights * (d_weights - delta_M[:, None])
                if HAS_NEAR and run == 2:
                    tl.store(d_near + row[:, None] * W + (keys - start), d_scores)
                d_scores = d_scores.to(query_MxD.dtype)
                d_query_MxD = tl.dot(d_scores, key_NxD, d_query_MxD, input_precision=PRECISION)
                if run % 2 == 1:
                    d_far_MxR = tl.dot(d_scores, basis_NxR, d_far_MxR, input_precision=PRECISION)

    _store_block(d_query + head_row * D, 0, d_query_MxD * SCALE, BLOCK_M, D)
    if HAS_FAR:
        _store_block(d_far + head_row * R, 0, d_far_MxR * SCALE, BLOCK_M, R)
    if HAS_NEAR:  # what of the band lies before the first key or after the last
        for n in tl.range(start, start + W, BLOCK_N):
            if (n < ends[2]) | (n >= ends[3]):
                columns = n - start + tl.arange(0, BLOCK_N)[None, :]
                tl.store(d_near + row[:, None] * W + columns, tl.zeros([BLOCK_M, BLOCK_N], tl.float32))


@triton.jit
def key_gradients(
    query, key, value, near, far, basis, d_out, logsumexp, delta,
    row_length, key_length, group, origin, band_before, far_before, far_after, first_key, end_key,
    d_key, d_value,
    D: tl.constexpr, U: tl.constexpr, W: tl.constexpr, R: tl.constexpr, SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, HAS_NEAR: tl.constexpr, HAS_FAR: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK_N keys of one key head and adds over the query heads that share it. Scores are [N, M]."""
    blocks = key_length // BLOCK_N
    kv_head = tl.program_id(0) // blocks
    n = tl.multiple_of(tl.program_id(0) % blocks * BLOCK_N, BLOCK_N)
    head_key = kv_head.to(tl.int64) * key_length + n
    key_NxD = _block(key + head_key * D, 0, BLOCK_N, D)
    value_NxD = _block(value + head_key * D, 0, BLOCK_N, D)
    ends = _row_runs(n, row_length, origin, band_before, far_before, far_after, U, W, CAUSAL, HAS_NEAR)

    d_key_NxD = tl.zeros([BLOCK_N, D], tl.float32)
    d_value_NxD = tl.zeros([BLOCK_N, D], tl.float32)
    for member in tl.range(0, group):
        head_row = (kv_head * group + member).to(tl.int64) * row_length
        # Rows that have the keys in their run 4 come first, as rows rise towards the keys and past them.
        for order in tl.static_range(5):
            run = 4 - order
            if (HAS_FAR or run % 2 == 0) and (run == 0 or HAS_NEAR or CAUSAL) and (run < 3 or not CAUSAL):
                for m in tl.range(ends[order], ends[order + 1], BLOCK_M):
                    m = tl.multiple_of(m, BLOCK_M)
                    start = origin + m // U * U - band_before
                    row = tl.arange(0, BLOCK_M)
                    query_MxD = _block(query + head_row * D, m, BLOCK_M, D)
                    d_out_MxD = _block(d_out + head_row * D, m, BLOCK_M, D)
                    logsumexp_M = tl.load(logsumexp + head_row + m + row) * LOG2E
                    delta_M = tl.load(delta + head_row + m + row)
                    scores = tl.dot(key_NxD, tl.trans(query_MxD), input_precision=PRECISION)
                    if run % 2 == 1:
                        far_MxR = _block(far + head_row * R, m, BLOCK_M, R)
                        basis_NxR = _block(basis, _basis_row(n, start, far_before, W), BLOCK_N, R)
                        scores = tl.dot(basis_NxR, tl.trans(far_MxR), scores, input_precision=PRECISION)
                    scores = _finish(
                        scores, near + (head_row + m) * W, row[None, :], n + tl.arange(0, BLOCK_N)[:, None], start,
                        origin + m, first_key, end_key, W, SCALE, CAUSAL, RAGGED, HAS_NEAR, run == 2,
                    )  # fmt: skip
                    weights = tl.exp2(scores - logsumexp_M[None, :])
                    d_value_NxD = tl.dot(weights.to(d_out_MxD.dtype), d_out_MxD, d_value_NxD, input_precision=PRECISION)
                    d_weights = tl.dot(value_NxD, tl.trans(d_out_MxD), input_precision=PRECISION)
                    d_scores = (weights * (d_weights - delta_M[None, :])).to(query_MxD.dtype)
                    d_key_NxD = tl.dot(d_scores, query_MxD, d_key_NxD, input_precision=PRECISION)

    _store_block(d_key + head_key * D, 0, d_key_NxD * SCALE, BLOCK_N, D)
    _store_block(d_value + head_key * D, 0, d_value_NxD, BLOCK_N, D)


# -- what the three share -----------------------------------------------------------------------------------------


@triton.jit
def _rows_of_program(row_length, BLOCK_M: tl.constexpr):
    """A program's head and first row. The last rows come first: where causal they take longest."""
    blocks = row_length // BLOCK_M
    return tl.program_id(0) // blocks, tl.multiple_of((blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M, BLOCK_M)


@triton.jit
def _block(pointer, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows first .. first + ROWS - 1 of a contiguous [.., COLUMNS]."""
    return tl.load(pointer + (first + tl.arange(0, ROWS)[:, None]) * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _store_block(pointer, first, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`block` to rows first .. first + ROWS - 1 of a contiguous [.., COLUMNS], in its dtype."""
    rows = (first + tl.arange(0, ROWS)[:, None]) * COLUMNS
    tl.store(pointer + rows + tl.arange(0, COLUMNS)[None, :], block.to(pointer.dtype.element_ty))


@triton.jit
def _clip(x, high):
    return tl.minimum(tl.maximum(x, 0), high)


@triton.jit
def _key_runs(
    tile, key_length, origin, band_before, far_before, far_after,
    U: tl.constexpr, W: tl.constexpr, CAUSAL: tl.constexpr, HAS_NEAR: tl.constexpr,
):  # fmt: skip
    """For row tile `tile`: the band's first key, and where runs 0 .. 4 of its keys begin and the last ends."""
    start = origin + tile * U - band_before
    end = key_length
    if CAUSAL:
        end = _clip(origin + (tile + 1) * U, key_length)
    if HAS_NEAR or CAUSAL:
        ends = (
            0, _clip(start - far_before, end), _clip(start, end), _clip(start + W, end),
            _clip(start + W + far_after, end), end,
        )  # fmt: skip
    else:  # all keys are alike
        ends = (0, end, end, end, end, end)
    return start, ends


@triton.jit
def _row_runs(
    key, row_length, origin, band_before, far_before, far_after,
    U: tl.constexpr, W: tl.constexpr, CAUSAL: tl.constexpr, HAS_NEAR: tl.constexpr,
):  # fmt: skip
    """For a block of keys from `key`: where the rows with it in their runs 4 .. 0 begin, and where the last end."""
    own = key - origin + band_before  # row tiles from `own` tokens on have the keys before their band
    if HAS_NEAR or CAUSAL:
        ends = (
            0, _tiles_to(own - W - far_after, row_length, U), _tiles_to(own - W, row_length, U),
            _tiles_to(own, row_length, U), _tiles_to(own + far_before, row_length, U), row_length,
        )  # fmt: skip
    else:
        ends = (0, 0, 0, 0, 0, row_length)
    return ends


@triton.jit
def _tiles_to(token, row_length, U: tl.constexpr):
    """The end of the row tiles that begin at `token` or before; none where it is negative (no division of those)."""
    return tl.minimum(tl.maximum(token + U, 0) // U * U, row_length)


@triton.jit
def _basis_row(key, start, far_before, W: tl.constexpr):
    """The row of `basis` of a key that is far from the row tile whose band begins at `start`."""
    away = key - start
    return far_before + tl.where(away < 0, away, away - W)


@triton.jit
def _finish(
    scores, near, row, key, start, own, first_key, end_key,
    W: tl.constexpr, SCALE: tl.constexpr, CAUSAL: tl.constexpr, RAGGED: tl.constexpr, HAS_NEAR: tl.constexpr,
    IN_BAND: tl.constexpr,
):  # fmt: skip
    """Scores in base 2, with near scores and masks, of products. `row` and `key` broadcast to the block.

    row: rows from `near`'s first; own: the key at that one's position.
    """
    scores *= SCALE * LOG2E
    if IN_BAND:
        if HAS_NEAR:
            scores += tl.load(near + row * W + (key - start)) * LOG2E
        elif CAUSAL:
            scores = tl.where(key <= own + row, scores, MASKED)
    if RAGGED:
        scores = tl.where((key >= first_key) & (key < end_key), scores, MASKED)
    return scores
