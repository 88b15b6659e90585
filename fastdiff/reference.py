"""The definition of every fused operation in plain PyTorch. These functions are the CPU path, and what the kernels are held to.

No random state: noise is a function of (seed, sample id, stream, row, element).
"""

from __future__ import annotations

import torch
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
