"""The definition of every fused operation in plain PyTorch. These functions are the CPU path, and what the kernels are held to.

No random state: noise is a function of (seed, sample id, stream, row, element).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), four 32-bit words for a counter and a key.

    All arguments are int64 tensors with 0 <= word < 2^32 that broadcast together; so are the four results.
    """
    # int64 products wrap modulo 2^64, so both 32-bit halves of an unsigned product come out right.
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two fp32 standard normals from two 32-bit words (Box & Muller 1958): u = (w0 + 1/2) 2^-32 in (0, 1], theta = int32(w1) 2 pi 2^-32.

    |z| <= sqrt(-2 ln 2^-33) < 6.77.
    """
    u = w0.to(torch.float32) * 2.0**-32 + 2.0**-33
    theta = (w1 - ((w1 >> 31) << 32)).to(torch.float32) * 1.4629180792671596e-09
    r = torch.sqrt(torch.log(u) * -2.0)
    return r * torch.cos(theta), r * torch.sin(theta)


def noise_words(seeds: Tensor, ids: Tensor, counter: Tensor, quads: int) -> Tensor:
    """The words of the noise stream, int64 [N, quads, 4] in [0, 2^32): DESIGN of the stream in the README, "Noise is a function".

    seeds, ids: int64 [N]. counter: integer tensor of one element, or of N, stream << 24 | row. Key = seed (lo, hi),
    counter words = (quad, stream and row, id lo, id hi).
    """
    quad = torch.arange(quads, device=seeds.device)[None, :]
    seed, sample = seeds[:, None], ids[:, None]
    c1 = counter.to(torch.int64).reshape(-1, 1) & _WORD
    zero = torch.zeros_like(quad + seed)
    words = philox(quad + zero, c1 + zero, (sample & _WORD) + zero, ((sample >> 32) & _WORD) + zero, seed & _WORD, (seed >> 32) & _WORD)
    return torch.stack(words, dim=-1)


def normal(seeds: Tensor, ids: Tensor, counter: Tensor, numel: int) -> Tensor:
    """Standard normal noise, fp32 [N, numel]: element e of a sample is value e % 4 of quad e // 4 of `noise_words`."""
    w0, w1, w2, w3 = noise_words(seeds, ids, counter, (numel + 3) // 4).unbind(-1)
    z = torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], dim=-1)
    return z.flatten(1)[:, :numel]


def add_noise(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    ids: Tensor | None,
    counter: Tensor | None,
    target: bool,
) -> tuple[Tensor, Tensor]:
    """q(x_t | x_0) with a timestep per sample: x_t = table[t, 0] x_0 + table[t, 1] z (Ho et al. 2020, equation 4), and the training target.

    x0: [N, ...] of any float dtype. t: int64 [N]. table: fp32 [T, 4] of (alpha, sigma, e, f); the target is e x_0 + f z, so
    (0, 1) trains epsilon, (-sigma, alpha) v, (1, 0) x0. noise: z of x0's shape, or None: then z is the noise stream at
    (seeds [N], ids [N], counter). Returns x_t and the target (empty unless `target`), both in x0's dtype, computed in fp32.
    """
    if noise is None:
        assert seeds is not None and ids is not None and counter is not None, "give noise, or seeds, ids and counter"
        z = normal(seeds, ids, counter, x0[0].numel() if len(x0) else 0).reshape(x0.shape)
    else:
        z = noise.float()
    alpha, sigma, e, f = table[t].reshape(-1, *[1] * (x0.ndim - 1), 4).unbind(-1)
    clean = x0.float()
    x_t = torch.addcmul(alpha * clean, sigma, z).to(x0.dtype)
    return x_t, torch.addcmul(e * clean, f, z).to(x0.dtype) if target else x0.new_empty(0)


# Columns of a solver table, fp32 [rows, COLUMNS], in order; see solver_step.
COLUMNS = ("px", "pm", "clip", "a", "b", "c", "d", "s", "c_next", "h0", "h1", "h2", "slot", "save_x", "save_x0", "log_s")
# Saved values that a solver may look back on, beside the x0 of the row before.
SLOTS = 3


def solver_step(
    x: Tensor,
    x0: Tensor,
    m: Tensor,
    model_input: Tensor,
    history: Tensor,
    table: Tensor,
    row: Tensor,
    seeds: Tensor,
    ids: Tensor,
    guidance: Tensor,
    noise: Tensor | None = None,
) -> None:
    """One row of a solver, in place on x, x0, history and model_input.

        m  = m_u + w (m_c - m_u)                    where m holds two halves, conditional first
        x0_new = clamp(px x + pm m, -clip, clip)
        x_new = a x + b x0_new + c x0 + d m + sum_k h_k history_k + s exp(log_s v) z
        history_slot <- save_x x + save_x0 x0_new   unless slot is -1
        x <- x_new;  x0 <- x0_new
        model_input <- c_next x_new                 in its own dtype, into both halves where it has two

    The columns of table[row] are COLUMNS. x, x0: fp32 [N, C, ...]. m, model_input: [N, C, ...] or [2N, C, ...], any float dtype; m may
    have 2C channels, the second C being v, which the network has learned of its variance (v of the conditional half), else v is 0.
    history: fp32 [SLOTS, N, C, ...], or [0, ...] for a table that uses none. row: integer [1]. seeds, ids: int64 [N]. guidance: w, fp32 [N].
    z: noise, fp32 of x's shape, or without it the noise stream at this row. A coefficient of 0 ignores what it weighs, even NaN, for x0, history
    and noise. NaN in m stays NaN: clamp does not hide it.
    """
    n, channels = x.shape[:2]
    per_sample = (n, *[1] * (x.ndim - 1))
    px, pm, clip, a, b, c, d, s, c_next, h0, h1, h2, slot, save_x, save_x0, log_s = table[row.reshape(())].unbind(0)
    model, v = m[:, :channels].float(), m[:n, channels:].float()
    if len(m) != n:
        model = model[n:] + guidance.reshape(per_sample) * (model[:n] - model[n:])
    new = torch.clamp(px * x + pm * model, -clip, clip)
    out = a * x + b * new + d * model
    if c != 0:
        out = out + c * x0
    if len(history):
        for h, saved in zip((h0, h1, h2), history, strict=True):
            if h != 0:
                out = out + h * saved
        if slot >= 0:
            history[int(slot)].copy_(save_x * x + save_x0 * new)
    if s != 0 and n:
        z = normal(seeds, ids, row, x[0].numel()).reshape(x.shape) if noise is None else noise
        out = out + s * (z * torch.exp(log_s * v) if v.numel() else z)
    x.copy_(out)
    x0.copy_(new)
    model_input.copy_((c_next * out).repeat(len(model_input) // max(n, 1), *[1] * (x.ndim - 1)))


# Columns of a scheduler's table, [rows, 11], in order; see scheduler_step. row: the row of the noise stream.
STEP_COLUMNS = ("px", "pm", "clip", "a", "b", "d", "c", "h", "s", "log_s", "row")


def scheduler_step(
    m: Tensor,
    x: Tensor,
    table: Tensor,
    rows: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    ids: Tensor | None,
    limit: Tensor | None,
    before: Tensor | None,
    earlier: Tensor | None,
    wide: bool,
) -> tuple[Tensor, Tensor]:
    """One row of a solver out of place, with a row for each sample if need be.

        x0 = clamp(px x + pm m, -clip, clip)        or, with limits, clamp(px x + pm m, -limit, limit) / limit
        x' = a x + b x0 + d m + c before + h earlier + s exp(log_s v) z

    Returns x' and x0, both of x's shape in the wider dtype of m and x; x0 in the table's if `wide`. m, x: [N, C, ...] of any float dtype; m may
    have 2C channels, the second C being v, else v is 0. table: [R, 11], fp32, or fp64 and then all is computed in fp64; the columns of a row
    are STEP_COLUMNS. rows: int64 [1], or [N]. z: noise, of x's shape, or, with seeds and ids, int64 [N], the noise stream at the row that the table
    names, or 0. limit: [N]. before, earlier: x0 of the step before and of the one before that. A coefficient of 0 may ignore what it weighs.
    """
    channels, dtype, exact = x.shape[1], torch.promote_types(m.dtype, x.dtype), table.dtype
    chosen = table[rows]
    if len(rows) == 1 and table.device.type == "cpu" and not torch.compiler.is_compiling():
        # As numbers, a term costs one pass over memory, and none where it is 0.
        (columns,) = chosen.tolist()
    else:
        columns = chosen.reshape(-1, *[1] * (x.ndim - 1), len(STEP_COLUMNS)).unbind(-1)
    px, pm, clip, a, b, d, c, h, s, log_s, _ = columns
    model, x = m[:, :channels].to(exact) if m.shape[1] != channels else m.to(exact), x.to(exact)
    new = _plus(px * x, pm, model)
    if limit is None:
        new = torch.clamp(new, -clip, clip)
    else:
        limit = limit.reshape(-1, *[1] * (x.ndim - 1))
        new = torch.clamp(new, -limit, limit) / limit
    out = _plus(_plus(a * x, b, new), d, model)
    if before is not None:
        out = _plus(out, c, before)
    if earlier is not None:
        out = _plus(out, h, earlier)
    if noise is None and seeds is not None and ids is not None and len(x):
        noise = normal(seeds, ids, chosen[:, -1].long(), x[0].numel()).reshape(x.shape)
    if noise is not None:
        if m.shape[1] != channels:
            noise = noise * torch.exp(log_s * m[:, channels:].to(exact))
        out = _plus(out, s, noise)
    return out.to(dtype), new if wide else new.to(dtype)


def _plus(total: Tensor, c: Tensor | float, v: Tensor) -> Tensor:
    """total + c v."""
    if isinstance(c, Tensor):
        return total + c * v
    return torch.add(total, v.to(total.dtype), alpha=c) if c else total


# Images of the network's insides are channels-last: [N, H, W, C], contiguous. e4m3 holds up to 448 in size (Micikevicius et al. 2022).
FP8, FP8_MAX = torch.float8_e4m3fn, 448.0


def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    style: Tensor | None,
    which: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    inverse: Tensor | None,
) -> Tensor:
    """silu((norm(x) gamma + beta) (1 + scale) + shift), norm over a group of channels of an image (Wu & He 2018), computed in fp32.

    x: [N, H, W, C] of any float dtype. gamma, beta: [C], of `groups` groups of neighbours. style: [M, 2 C], scale then shift, of which image i has row
    which[i], or with which None row i; None for neither. which: int64 [N]. silu: False leaves it out. Returns x's shape and dtype, or, with inverse,
    fp32 [1], e4m3 of inverse times that.
    """
    n, height, width, channels = x.shape
    grouped = x.float().reshape(n, height * width, groups, channels // groups)
    mean = grouped.mean((1, 3), keepdim=True)
    variance = (grouped - mean).square().mean((1, 3), keepdim=True)
    out = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    out = torch.addcmul(beta.float(), out, gamma.float())
    if style is not None:
        scale, shift = (style if which is None else style[which]).float()[:, None, None].chunk(2, dim=-1)  # [N, 1, 1, C]
        out = torch.addcmul(shift, out, 1 + scale)
    if silu:
        out = F.silu(out)
    return out.to(x.dtype) if inverse is None else to_fp8(out, inverse)


def to_fp8(x: Tensor, inverse: Tensor) -> Tensor:
    """e4m3 of inverse x, with what is too large at the largest."""
    return (x.float() * inverse).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def conv3x3(
    x: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    skip: list[Tensor],
    skip_weight: Tensor | None,
    norms: list[Tensor],
    style: Tensor | None,
    which: Tensor | None,
    inverse: Tensor | None,
    groups: int,
    eps: float,
    stride: int,
    raw: bool,
) -> list[Tensor]:
    """A convolution of 3 x 3 pixels and what stands around it in a residual block: y, as it is and normalised, computed in fp32.

        y = scale conv(x, weight) + bias + skip                 x: the given inputs side by side, as `torch.cat` has them
        out_i = silu((norm(y) gamma_i + beta_i) (1 + s) + t)

    x: one or two of [N, H, W, C], fp32, fp16, bf16 or e4m3. weight: [C', 3, 3, C] of that dtype, C over both inputs. bias: fp32 [1, C'], or [N, C'] for
    one an image. scale: fp32 [C'], of e4m3. skip: nothing, or one tensor of y's shape, or with skip_weight [C', C''] the inputs of a convolution of one
    pixel; fp32, fp16 or bf16. norms: gamma and beta, fp32 [C'], of no, one or two results. style: s and t for the first of them, and which, see
    group_norm_silu. inverse: fp32 [results], for results in e4m3. stride: 1 or 2, with one pixel of zeros around.

    Returns y, if raw, and each result, [N, H / stride, W / stride, C'], in skip_weight's dtype, or skip's, or weight's, or bf16 for e4m3.
    """
    wide = torch.cat([v.float() for v in x], dim=-1).permute(0, 3, 1, 2)
    y = F.conv2d(wide, weight.float().permute(0, 3, 1, 2), stride=stride, padding=1).permute(0, 2, 3, 1)
    if scale is not None:
        y = y * scale
    y = y + bias[:, None, None].float()
    if skip_weight is not None:
        y = y + torch.cat([v.float() for v in skip], dim=-1) @ skip_weight.float().T
    elif skip:
        y = y + skip[0].float()
    dtype = next((v.dtype for v in (skip_weight, *skip, weight) if v is not None and v.dtype != FP8), torch.bfloat16)
    return _results(y, dtype, norms, style, which, inverse, groups, eps, raw)


def _results(
    y: Tensor,
    dtype: torch.dtype,
    norms: list[Tensor],
    style: Tensor | None,
    which: Tensor | None,
    inverse: Tensor | None,
    groups: int,
    eps: float,
    raw: bool,
) -> list[Tensor]:
    """y in fp32 -> what an epilogue writes of it."""
    found = [y.to(dtype).contiguous()] if raw else []
    for i in range(len(norms) // 2):
        own = (style, which) if i == 0 else (None, None)
        made = group_norm_silu(y, norms[2 * i], norms[2 * i + 1], *own, groups, eps, True, None if inverse is None else inverse[i : i + 1])
        found.append((made.to(dtype) if inverse is None else made).contiguous())
    return found


def conv_up(
    x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor], inverse: Tensor | None, groups: int, eps: float, raw: bool
) -> list[Tensor]:
    """Every pixel repeated 2 x 2 times and a convolution of 3 x 3 pixels: a transposed convolution of 4 x 4, `up_weight` of the 3 x 3 one's weight.

    x: [N, H, W, C], fp32, fp16 or bf16. weight: [C', 4, 4, C]. bias: fp32 [1, C']. The rest as conv3x3's. Returns y, if raw, and each result,
    [N, 2 H, 2 W, C'], in x's dtype, or results in e4m3.
    """
    y = F.conv_transpose2d(x.float().permute(0, 3, 1, 2), weight.float().permute(3, 0, 1, 2), stride=2, padding=1).permute(0, 2, 3, 1)
    return _results(y + bias[:, None, None].float(), x.dtype, norms, None, None, inverse, groups, eps, raw)


def up_weight(weight: Tensor) -> Tensor:
    """[C', 3, 3, C] -> [C', 4, 4, C]: rows and columns (w2, w1 + w2, w0 + w1, w0), since a repeated pixel meets two taps at once."""
    for dim in (1, 2):
        w0, w1, w2 = weight.unbind(dim)
        weight = torch.stack([w2, w1 + w2, w0 + w1, w0], dim)
    return weight.contiguous()


# Columns of a matrix in a CPU's registers at a time.
WIDE = 32

# Winograd's method for 4 x 4 results of a 3 x 3 convolution: Lavin & Gray 2016, section 4.3.
WINOGRAD_BT = [
    [4, 0, -5, 0, 1, 0],
    [0, -4, -4, 1, 1, 0],
    [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0],
    [0, 2, -1, -2, 1, 0],
    [0, 4, 0, -5, 0, 1],
]
WINOGRAD_G = [
    [1 / 4, 0, 0],
    [-1 / 6, -1 / 6, -1 / 6],
    [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6],
    [1 / 24, -1 / 12, 1 / 6],
    [0, 0, 1],
]
WINOGRAD_AT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def panels(matrix: Tensor) -> Tensor:
    """[..., K, N] as a CPU multiplies by it: 32 columns at a time, [..., N / 32, K, 32]. N: a multiple of 32."""
    return torch.stack(torch.split(matrix, WIDE, dim=-1), dim=-3)


def conv_weight(weight: Tensor) -> Tensor:
    """A 3 x 3 convolution's weight [C', C, 3, 3] as a CPU multiplies by it what a pixel sees: `panels` [C' / 32, 9 C, 32]."""
    return panels(weight.permute(2, 3, 1, 0).flatten(0, 2)).contiguous()


def tiles(matrix: Tensor) -> Tensor:
    """[K, N] as the tiles of a CPU multiply by it: bf16 [N / 32, K / 32, 2, 16, 16, 2], of which [j, i, a, r, c, p] is the matrix's
    [32 i + 2 r + p, 32 j + 16 a + c]."""
    k, n = matrix.shape
    return matrix.reshape(k // 32, 16, 2, n // 32, 2, 16).permute(3, 0, 4, 1, 5, 2).to(torch.bfloat16).contiguous()


def tiled_weight(weight: Tensor) -> Tensor:
    """A 3 x 3 convolution's weight [C', C, 3, 3] as `tiles`, bf16 [C' / 32, 9 C / 32, 2, 16, 16, 2]: tap by tap, of each its channels."""
    return tiles(weight.permute(2, 3, 1, 0).flatten(0, 2))


def winograd_matrices(weight: Tensor) -> Tensor:
    """G w G^T of a 3 x 3 convolution's weight [C', C, 3, 3]: fp32 [36, C, C']."""
    g = torch.tensor(WINOGRAD_G, dtype=torch.float64, device=weight.device)
    return torch.einsum("ia,jb,ocab->ijco", g, g, weight.double()).reshape(36, *weight.shape[1::-1]).float().contiguous()


def winograd_weight(weight: Tensor) -> Tensor:
    """`winograd_matrices` as `panels`, fp32 [36, C' / 32, C, 32]."""
    return panels(winograd_matrices(weight))


def winograd_conv3x3(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """A 3 x 3 convolution within a border of zeros by Winograd's method: A^T [(G w G^T) * (B^T x B)] A, each 4 x 4 of its results from 6 x 6 pixels.

    x: fp32 [N, C, H, W], H and W multiples of 4. packed: `winograd_weight`. bias: fp32 [C'] or None. Returns fp32 [N, C', H, W], channels-last. A
    quarter of the direct convolution's multiplications, and some ten times its error: 1e-5 of the largest value.
    """
    matrices = packed.transpose(1, 2).flatten(2)  # [36, C, C']
    (n, c, h, w), out = x.shape, matrices.shape[2]
    tiles = h * w // 16
    bt, at = torch.tensor(WINOGRAD_BT, device=x.device).to(x), torch.tensor(WINOGRAD_AT, device=x.device).to(x)
    pixels = F.unfold(x, 6, padding=1, stride=4).view(n, c, 6, 6, tiles)
    places = torch.einsum("ip,jq,ncpqt->ijntc", bt, bt, pixels).reshape(36, n * tiles, c)
    made = torch.bmm(places, matrices).view(6, 6, n, tiles, out)
    y = F.fold(torch.einsum("pi,qj,ijnto->nopqt", at, at, made).reshape(n, 16 * out, tiles), (h, w), 4, stride=4)
    y = y if bias is None else y + bias[:, None, None]
    return y.contiguous(memory_format=torch.channels_last)


def fold(x: Tensor, patch: int) -> Tensor:
    """F.pixel_unshuffle, [N, C, H, W] -> [N, C patch^2, H / patch, W / patch], for no images too, which that leaves as they are."""
    n, channels, height, width = x.shape
    split = x.reshape(n, channels, height // patch, patch, width // patch, patch)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(n, channels * patch**2, height // patch, width // patch)


def unfold(x: Tensor, patch: int) -> Tensor:
    """F.pixel_shuffle, the inverse of `fold`."""
    n, channels, height, width = x.shape
    split = x.reshape(n, channels // patch**2, patch, patch, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(n, channels // patch**2, height * patch, width * patch)


def conv_in(
    x: Tensor, weight: Tensor, bias: Tensor, norms: list[Tensor], inverse: Tensor | None, patch: int, groups: int, eps: float, raw: bool
) -> list[Tensor]:
    """The first convolution: patch x patch pixels folded into channels (`F.pixel_unshuffle`), then 3 x 3 of them, from channels first to last.

    x: [N, C, H, W], fp32, fp16 or bf16. weight: [C', 3, 3, C patch^2] of that dtype. bias: fp32 [1, C']. The rest as conv3x3's. Returns y, if raw,
    and each result, [N, H / patch, W / patch, C'], in x's dtype, or results in e4m3.
    """
    y = F.conv2d(fold(x.float(), patch), weight.float().permute(0, 3, 1, 2), padding=1).permute(0, 2, 3, 1)
    return _results(y + bias[:, None, None].float(), x.dtype, norms, None, None, inverse, groups, eps, raw)


def conv_out(x: Tensor, weight: Tensor, bias: Tensor, patch: int) -> Tensor:
    """The last convolution, 3 x 3, its channels unfolded to patch x patch pixels (`F.pixel_shuffle`), from channels last to first.

    x: [N, H, W, C], fp32, fp16 or bf16. weight: [C' patch^2, 3, 3, C] of that dtype. bias: fp32 [C' patch^2]. Returns [N, C', H patch, W patch] in
    x's dtype.
    """
    y = F.conv2d(x.float().permute(0, 3, 1, 2), weight.float().permute(0, 3, 1, 2), bias.float(), padding=1)
    return unfold(y, patch).to(x.dtype).contiguous()
