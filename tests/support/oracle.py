"""What the tests hold the code to: every method and attention itself, as slow float64 NumPy loops over scalars.

Nothing here imports wavelet_jax; each function is written from its paper. One function a question: `score` is
q . k with a method's terms, `embedding` and `value` the two other places where a method may enter. A new position
method needs a case in `score` (and in the others if it uses them); `KNOWN` tells the conformance suite which have one.
"""

import functools
import math
from fractions import Fraction

import numpy as np
import pywt

KNOWN = {
    "wavelet",
    "discrete_wavelet",
    "rope",
    "alibi",
    "transformer_xl",
    "shaw",
    "t5",
    "sinusoidal",
    "learned",
    "nope",
}

PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494459")


def psi(mother: str, t: float, scale: float, shift: float) -> float:
    """Eqs. (11), (12), (15) and section 6.3.1: one value of one wavelet; no factor 1/sqrt(scale)."""
    x = (t - shift) / scale
    match mother:
        case "ricker":
            return (1 - x**2) * math.exp(-(x**2) / 2)
        case "gaussian":
            return math.exp(-(x**2))
        case "morlet":
            return math.exp(-(x**2)) * math.cos(t - shift)
        case "haar":
            return 1.0 if -0.5 <= x < 0 else -1.0 if -1 <= x < -0.5 else 0.0
        case "haar_standard":
            return 1.0 if 0 <= x < 0.5 else -1.0 if 0.5 <= x < 1 else 0.0
    raise AssertionError(mother)


def psi_gradient(mother: str, t: float, scale: float, shift: float) -> tuple[float, float]:
    """(d psi / d scale, d psi / d shift), by hand."""
    x = (t - shift) / scale
    match mother:
        case "ricker":
            slope = (x**3 - 3 * x) * math.exp(-(x**2) / 2)
        case "gaussian":
            slope = -2 * x * math.exp(-(x**2))
        case "morlet":
            envelope, envelope_slope = math.exp(-(x**2)), -2 * x * math.exp(-(x**2))
            cosine, sine = math.cos(t - shift), math.sin(t - shift)
            return -x / scale * envelope_slope * cosine, -envelope_slope * cosine / scale + envelope * sine
        case _:
            slope = 0.0
    return -x / scale * slope, -slope / scale


def grid(head_dim: int, num_scales: int, first_exponent: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Eq. (13): every scale 2^e with every shift 0 .. d/s - 1."""
    pairs = [
        (2.0**exponent, float(shift))
        for exponent in range(first_exponent, first_exponent + num_scales)
        for shift in range(head_dim // num_scales)
    ]
    return np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])


def wavelet_vector(t: int, scales: np.ndarray, shifts: np.ndarray, mother: str = "ricker") -> np.ndarray:
    """p[t, :], Eq. (14), where t is m - n (or n - m: the caller's sign)."""
    return np.array([psi(mother, t, a, b) for a, b in zip(scales, shifts, strict=True)])


@functools.cache
def discrete_samples(name: str, level: int) -> np.ndarray:
    """psi of a discrete wavelet in steps of 2^-level by the cascade: the high-pass filter once, then the low-pass one.

    The wavelet of decomposition: its filters run backwards are those that would build signals of it. Of PyWavelets only
    the filters are taken, and its conventions: a zero at x = 0, and the sign of biorthogonal wavelets.
    """
    filters = pywt.Wavelet(name)
    low, high = np.array(filters.dec_lo[::-1]), np.array(filters.dec_hi[::-1])
    sign = -1 if not filters.orthogonal and filters.vanishing_moments_psi % 4 != 1 else 1
    values = sign * 2 ** (level / 2) * high
    for _ in range(level - 1):
        spread = np.zeros(2 * len(values) - 1)
        spread[::2] = values
        values = np.convolve(spread, low)
    return np.concatenate([[0.0], values])


def discrete_vector(
    t: int,
    head_dim: int,
    wavelet: str = "db2",
    num_levels: int = 8,
    first_level: int = 1,
    sampling: str = "level",
    origin: str = "start",
    t_sign: str = "m-n",
) -> np.ndarray:
    """p[t, :] of A.14 for t = m - n, level by level; the readings are those of wavelet_jax/wavelets/discrete.py."""
    vector = []
    for level in range(first_level, first_level + num_levels):
        step = 1 if sampling == "level" else 2 ** (12 - level)
        psi = discrete_samples(wavelet, level if sampling == "level" else 12)
        middle = (pywt.Wavelet(wavelet).dec_len - 1) * 2**level // 2 if origin == "centre" else 0
        for shift in range(head_dim // num_levels):
            index = step * (t + middle - (shift if t_sign == "m-n" else -shift))
            vector.append(psi[index] if 0 <= index < len(psi) else 0.0)
    return np.array(vector)


def angle_error(angle: float, position: int, frequency: float) -> float:
    """|angle - position * frequency| around the circle, radians, in exact arithmetic (2 pi to 60 digits)."""
    turns = (Fraction(angle) - position * Fraction(frequency)) / (2 * PI)
    return float(abs(turns - round(turns)) * 2 * PI)


def theta_power(i: int, dim: int, theta: float) -> float:
    """RoPE's and the sinusoid's frequency i, radians a token."""
    return theta ** (-2 * i / dim)


def rope(x: np.ndarray, position: int, theta: float = 10000.0, layout: str = "half_split") -> np.ndarray:
    """One rotated head vector: pair i as a complex number, multiplied by exp(j position theta^(-2i/d))."""
    half = len(x) // 2
    out = np.empty(len(x))
    for i in range(half):
        first, second = (i, i + half) if layout == "half_split" else (2 * i, 2 * i + 1)
        turn = position * theta_power(i, len(x), theta)
        rotated = complex(x[first], x[second]) * complex(math.cos(turn), math.sin(turn))
        out[first], out[second] = rotated.real, rotated.imag
    return out


@functools.cache
def alibi_slopes(num_heads: int) -> list[float]:
    """The recursion of the ALiBi authors' `get_slopes`."""
    if math.log2(num_heads).is_integer():
        start = 2 ** (-8 / num_heads)
        return [start ** (h + 1) for h in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


@functools.cache
def t5_bucket(distance: int, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = False) -> int:
    """T5's rule with its logarithms as comparisons of whole numbers, so that edges cannot be rounded.

    floor(log(n / exact) / log(max_distance / exact) * rest) >= i  where  n^rest exact^i >= max_distance^i exact^rest.
    """
    first = 0
    if bidirectional:
        num_buckets //= 2
        first, length = (num_buckets if distance < 0 else 0), abs(distance)
    else:
        length = max(distance, 0)
    exact = num_buckets // 2
    if length < exact:
        return first + length
    rest = num_buckets - exact
    step = 0
    while step < rest - 1 and length**rest * exact ** (step + 1) >= max_distance ** (step + 1) * exact**rest:
        step += 1
    return first + exact + step


def embedding(method: str, options: dict, params: dict, position: int, width: int) -> np.ndarray | None:
    """What a method adds to the token embedding, [width]; None for those that add nothing."""
    match method:
        case "learned":
            return params["table"][position]
        case "sinusoidal":
            theta = options.get("theta", 10000.0)
            wave = np.empty(width)
            for i in range(width // 2):
                wave[2 * i] = math.sin(position * theta_power(i, width, theta))
                wave[2 * i + 1] = math.cos(position * theta_power(i, width, theta))
            return wave
    return None


def _wavelet_grid(options: dict, params: dict, head: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    if options.get("trainable"):
        scales, shifts = 2.0 ** params["log2_scales"], params["shifts"]
    elif "scales" in options:
        # The float32 values are the definition; what the caller wrote is rounded to them.
        scales, shifts = (np.asarray(options[k], np.float32).astype(np.float64) for k in ("scales", "shifts"))
    else:
        scales, shifts = grid(head_dim, options.get("num_scales", 8), options.get("first_exponent", 0))
    return (scales[head], shifts[head]) if np.ndim(scales) == 2 else (scales, shifts)


def score(
    method: str, options: dict, params: dict, head: int, num_heads: int, q: np.ndarray, k: np.ndarray, m: int, n: int
) -> float:
    """The attention score of query q [D] at position m and key k [D] at position n."""
    root = math.sqrt(len(q))
    match method:
        case "wavelet":  # Eq. (10)
            t = m - n if options.get("t_sign", "m-n") == "m-n" else n - m
            scales, shifts = _wavelet_grid(options, params, head, len(q))
            return (q @ k + q @ wavelet_vector(t, scales, shifts, options.get("mother", "ricker"))) / root
        case "discrete_wavelet":  # A.14
            return (q @ k + q @ discrete_vector(m - n, len(q), **options)) / root
        case "rope":
            return rope(q, m, **options) @ rope(k, n, **options) / root
        case "alibi":
            return q @ k / root - alibi_slopes(num_heads)[head] * abs(m - n)
        case "transformer_xl":  # (a) + (b) + (c) + (d) of section 3.3
            width = params["projection"].shape[0]
            turns = [(m - n) * theta_power(i, width, options.get("theta", 10000.0)) for i in range(width // 2)]
            wave = np.array([math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns])
            position = wave @ params["projection"][:, head]
            u, v = params["content_bias"][head], params["position_bias"][head]
            return (q @ k + q @ position + u @ k + v @ position) / root
        case "shaw":
            clip = options.get("clip_distance", 64)
            return q @ (k + params["keys"][max(-clip, min(clip, m - n)) + clip]) / root
        case "t5":
            return q @ k / root + params["bias"][t5_bucket(m - n, **options), head]
        case "sinusoidal" | "learned" | "nope":
            return q @ k / root
    raise AssertionError(f"tests/oracle.py has no score of {method}: write it from the method's paper")


def value(method: str, options: dict, params: dict, v: np.ndarray, m: int, n: int) -> np.ndarray:
    """What a query at m takes from a value v [D] at n."""
    if method == "shaw" and options.get("values"):
        clip = options.get("clip_distance", 64)
        return v + params["values"][max(-clip, min(clip, m - n)) + clip]
    return v


def attention(
    query,  # [B, T, H, D]
    key,  # [B, S, K, D]
    value_,  # [B, S, K, D]
    method: str = "nope",
    options: dict | None = None,
    params: dict | None = None,
    *,
    causal: bool = True,
    query_positions=None,  # [B, T]
    key_positions=None,  # [B, S]
    query_segments=None,  # [B, T]
    key_segments=None,  # [B, S]
    window: int | None = None,
    mask=None,  # [B, H, T, S]
) -> np.ndarray:
    """Softmax attention, one query and one key at a time; zeros for a query that sees no key. [B, T, H, D]."""
    options = options or {}
    params = {name: np.asarray(param, np.float64) for name, param in (params or {}).items()}
    query, key, value_ = (np.asarray(x, np.float64) for x in (query, key, value_))
    (batch, num_queries, num_heads, _), (_, num_keys, num_kv_heads, _) = query.shape, key.shape
    out = np.zeros(query.shape)
    for b in range(batch):
        for i in range(num_queries):
            m = i if query_positions is None else int(query_positions[b][i])
            for h in range(num_heads):
                kv = h * num_kv_heads // num_heads
                scores, values = [], []
                for j in range(num_keys):
                    n = j if key_positions is None else int(key_positions[b][j])
                    if causal and n > m:
                        continue
                    if window is not None and abs(m - n) >= window:
                        continue
                    if query_segments is not None and query_segments[b][i] != key_segments[b][j]:
                        continue
                    if mask is not None and not mask[b][h][i][j]:
                        continue
                    scores.append(score(method, options, params, h, num_heads, query[b, i, h], key[b, j, kv], m, n))
                    values.append(value(method, options, params, value_[b, j, kv], m, n))
                weights = [math.exp(s - max(scores)) for s in scores]
                for weight, each in zip(weights, values, strict=True):
                    out[b, i, h] += weight / sum(weights) * each
    return out


# --- The same in arrays, with gradients ------------------------------------------------------------------------


def tables(method: str, options: dict, params: dict, num_heads: int, head_dim: int, distances) -> tuple:
    """What a method adds at each distance: (vectors [H, n, D], biases [H, n], value vectors [n, D]), zeros if nothing.

    The numbers are those of `score` and `value`, one distance at a time.
    """
    zero, (none, one) = np.zeros(head_dim), (np.zeros(head_dim), np.ones(head_dim))
    vectors = np.zeros((num_heads, len(distances), head_dim))
    biases, values = np.zeros((num_heads, len(distances))), np.zeros((len(distances), head_dim))
    for i, t in enumerate(int(t) for t in distances):
        values[i] = value(method, options, params, zero, t, 0)
        for head in range(num_heads):
            match method:
                case "wavelet":
                    scales, shifts = _wavelet_grid(options, params, head, head_dim)
                    sign = 1 if options.get("t_sign", "m-n") == "m-n" else -1
                    vectors[head, i] = wavelet_vector(sign * t, scales, shifts, options.get("mother", "ricker"))
                case "discrete_wavelet":
                    vectors[head, i] = discrete_vector(t, head_dim, **options)
                case "transformer_xl":
                    vectors[head, i] = _waves(params, options, t) @ params["projection"][:, head]
                case "shaw":
                    clip = options.get("clip_distance", 64)
                    vectors[head, i] = params["keys"][max(-clip, min(clip, t)) + clip]
                case "alibi" | "t5":
                    biases[head, i] = score(method, options, params, head, num_heads, none, one, t, 0)
    return vectors, biases, values


def _waves(params: dict, options: dict, t: int) -> np.ndarray:
    """Transformer-XL's sinusoid of one distance: sines, then cosines."""
    width = params["projection"].shape[0]
    turns = [t * theta_power(i, width, options.get("theta", 10000.0)) for i in range(width // 2)]
    return np.array([math.sin(turn) for turn in turns] + [math.cos(turn) for turn in turns])


def parameter_gradients(method: str, options: dict, params: dict, distances, d_vectors, d_biases, d_values) -> dict:
    """Gradients by the parameters that are in the tables, from gradients by the tables."""
    found = {name: np.zeros(np.shape(param)) for name, param in params.items()}
    for i, t in enumerate(int(t) for t in distances):
        match method:
            case "wavelet" if options.get("trainable"):
                sign = 1 if options.get("t_sign", "m-n") == "m-n" else -1
                for head, column in np.ndindex(d_vectors.shape[0], d_vectors.shape[2]):
                    scales, shifts = _wavelet_grid(options, params, head, d_vectors.shape[2])
                    place = (head, column) if found["shifts"].ndim == 2 else (column,)
                    slopes = psi_gradient(options.get("mother", "ricker"), sign * t, scales[column], shifts[column])
                    for name, slope in zip(("log2_scales", "shifts"), slopes, strict=True):
                        inner = scales[column] * math.log(2) if name == "log2_scales" else 1.0
                        found[name][place] += d_vectors[head, i, column] * slope * inner
            case "transformer_xl":
                found["projection"] += np.einsum("e,hd->ehd", _waves(params, options, t), d_vectors[:, i])
            case "shaw":
                clip = options.get("clip_distance", 64)
                row = max(-clip, min(clip, t)) + clip
                found["keys"][row] += d_vectors[:, i].sum(axis=0)
                if "values" in found:
                    found["values"][row] += d_values[i]
            case "t5":
                found["bias"][t5_bucket(t, **options)] += d_biases[:, i]
    return found


def attention_and_gradients(
    query,  # [B, T, H, D]
    key,  # [B, S, K, D]
    value_,  # [B, S, K, D]
    cotangent,  # [B, T, H, D]
    method: str,
    options: dict,
    params: dict,
    query_positions,  # [B, T]
    key_positions,  # [B, S]
    visible,  # bool [B, H, T, S]
) -> tuple[dict, float]:
    """{name: array} of the output and its gradients by query, key, value and parameters; the largest |score|.

    Float64 by NumPy, the gradients by hand.
    """
    params = {name: np.asarray(param, np.float64) for name, param in params.items()}
    query, key, value_, cotangent = (np.asarray(x, np.float64) for x in (query, key, value_, cotangent))
    H, D, K = *query.shape[2:], key.shape[2]
    distance = np.asarray(query_positions, np.int64)[:, :, None] - np.asarray(key_positions, np.int64)[:, None, :]
    distances, index = np.unique(distance, return_inverse=True)
    index = index.reshape(distance.shape)
    P, bias, V = tables(method, options, params, H, D, distances)

    def turned(x, positions, back: bool = False):
        if method != "rope":
            return x
        places = np.ndindex(x.shape[:3])
        sign = -1 if back else 1
        return np.array([rope(x[p], sign * int(positions[p[0]][p[1]]), **options) for p in places]).reshape(x.shape)

    def heads(x):  # [B, S, K, D] -> [B, S, H, D]
        return np.repeat(x, H // K, axis=2)

    def grouped(x):  # its transpose
        return x.reshape(*x.shape[:2], K, H // K, D).sum(axis=3)

    turned_query, k, v = turned(query, query_positions), heads(turned(key, key_positions)), heads(value_)
    content = turned_query + params.get("content_bias", 0.0)
    position = turned_query + params.get("position_bias", 0.0)
    P_t = np.moveaxis(P[:, index], 0, 1)  # [B, H, T, S, D]
    products = np.einsum("bthd,bshd->bhts", content, k) + np.einsum("bthd,bhtsd->bhts", position, P_t)
    scores = products / math.sqrt(D) + np.moveaxis(bias[:, index], 0, 1)
    top = np.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e300)
    weights = np.where(visible, np.exp(np.minimum(scores - top, 0)), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    V_t = V[index]  # [B, T, S, D]
    out = np.einsum("bhts,bshd->bthd", weights, v) + np.einsum("bhts,btsd->bthd", weights, V_t)

    d_weights = np.einsum("bthd,bshd->bhts", cotangent, v) + np.einsum("bthd,btsd->bhts", cotangent, V_t)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True))
    scaled = d_scores / math.sqrt(D)
    d_content, d_position = np.einsum("bhts,bshd->bthd", scaled, k), np.einsum("bhts,bhtsd->bthd", scaled, P_t)
    d_P, d_bias, d_V = np.zeros_like(P), np.zeros_like(bias), np.zeros_like(V)
    for h in range(H):
        np.add.at(d_P[h], index, np.einsum("bts,btd->btsd", scaled[:, h], position[:, :, h]))
        np.add.at(d_bias[h], index, d_scores[:, h])
    np.add.at(d_V, index, np.einsum("bhts,bthd->btsd", weights, cotangent))
    found = parameter_gradients(method, options, params, distances, d_P, d_bias, d_V)
    for name, gradient in (("content_bias", d_content), ("position_bias", d_position)):
        if name in params:
            found[name] = gradient.sum(axis=(0, 1))
    found["out"] = out
    found["query"] = turned(d_content + d_position, query_positions, back=True)
    found["key"] = turned(grouped(np.einsum("bhts,bthd->bshd", scaled, content)), key_positions, back=True)
    found["value"] = grouped(np.einsum("bhts,bthd->bshd", weights, cotangent))
    return found, float(np.max(np.abs(scores), where=visible, initial=0))
