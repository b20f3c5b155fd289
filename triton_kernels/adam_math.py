"""The Adam/AdamW update and the scalars it needs: the twin of csrc/adam.h, line for line, with its names.

Division and square root are correctly rounded: in fp64 `/` and tl.sqrt are, in fp32 tl.div_rn and tl.sqrt_rn.
Source: Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (decoupled decay), Reddi et al. 2018 (amsgrad).
"""

import triton
import triton.language as tl

# How the parameter is stored; kind = (format * 2 + grad_is_f32) * 4 + coupled * 2 + amsgrad.
F32 = tl.constexpr(0)
BF16_SPLIT = tl.constexpr(1)
BF16_MASTER = tl.constexpr(2)
FP16_MASTER = tl.constexpr(3)
BF16_NONE = tl.constexpr(4)
FP16_NONE = tl.constexpr(5)


@triton.jit
def power(base, exponent):
    """base^exponent in fp64 by binary exponentiation, scalars."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        if exponent & 1 != 0:
            result = result * base
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def adam_scalars(lr, beta1, beta2, eps, weight_decay, step, sign, decoupled, grad_scale):
    """The nine fp32 scalars of AdamScalars, in its order, from fp64 ones; each rounded once."""
    count = step.to(tl.int64)
    bias1 = 1.0 - power(beta1, count)
    bias2 = 1.0 - power(beta2, count)
    return (
        (grad_scale * sign).to(tl.float32),
        weight_decay.to(tl.float32),
        (1.0 - lr * weight_decay * decoupled).to(tl.float32),
        (1.0 - beta1).to(tl.float32),
        beta2.to(tl.float32),
        (1.0 - beta2).to(tl.float32),
        (lr / bias1).to(tl.float32),
        (1.0 / tl.sqrt(bias2)).to(tl.float32),
        eps.to(tl.float32),
    )


@triton.jit
def clip_coefficient(norm, max_norm):
    coefficient = max_norm / (norm + 1e-6)
    return tl.where(coefficient > 1.0, 1.0, coefficient)  # NaN stays NaN


@triton.jit
def adam_update(p, m, v, vmax, g, s, COUPLED: tl.constexpr, AMSGRAD: tl.constexpr):
    """New (p, m, v, vmax) of fp32 elements; s is the tuple of the nine scalars."""
    (
        grad_scale,
        weight_decay,
        decay,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        step_size,
        inv_sqrt_bias2,
        eps,
    ) = s
    g = g * grad_scale
    if COUPLED:
        g = g + weight_decay * p
    else:
        p = p * decay
    m = m + one_minus_beta1 * (g - m)
    v = beta2 * v + one_minus_beta2 * (g * g)
    h = v
    if AMSGRAD:
        h = tl.where((v > vmax) | (v != v), v, vmax)
        vmax = h
    p = p - step_size * tl.div_rn(m, tl.sqrt_rn(h) * inv_sqrt_bias2 + eps)
    return p, m, v, vmax


@triton.jit
def live_master(master, rounded_master, stored, stored_value):
    """The stored 16-bit weight where the user wrote it between steps, else the master, which it rounds."""
    return tl.where(rounded_master == stored, master, stored_value)
