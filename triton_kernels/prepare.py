"""What a step needs before its first element: whether it is skipped, the clip coefficient, and the scalars.

All in fp64 on the device, so that a step asks the host for nothing. One program per group of hyperparameters.
"""

import triton
import triton.language as tl

from .adam_math import adam_scalars, clip_coefficient

# Fields of the control array.
GRAD_SCALE = tl.constexpr(0)  # in: factor on the gradients
MAX_NORM = tl.constexpr(1)  # in: inf for no clipping
SQUARE_SUM = tl.constexpr(2)  # in: of the gradients as stored; 0 if not computed
FOUND_INF = tl.constexpr(3)  # in: nonzero to skip the step
SKIP_NONFINITE = tl.constexpr(4)  # in: nonzero to skip the step if SQUARE_SUM is not finite
SKIP = tl.constexpr(5)  # out: 1 if the step is skipped, else 0
NORM = tl.constexpr(6)  # out: norm of the scaled gradients
SKIPPED = tl.constexpr(7)  # in and out: SKIP is added
NUM_WARPS = 1


@triton.jit(
    do_not_specialize=["k"],
    do_not_specialize_on_alignment=["hypers", "step_addresses", "control", "scalars"],
)
def prepare_kernel(
    hypers,  # [k, 8] fp64, read-only: lr, beta1, beta2, eps, weight_decay, step, sign, decoupled
    step_addresses,  # [k] int64, read-only: of fp32 step counts, +1 unless skipped; None: steps of hypers
    control,  # [8] fp64: fields 0-4 are read, 5-7 written
    scalars,  # [k, 9] fp32, written: AdamScalars
    k,  # int
):
    index = tl.program_id(0)
    grad_scale = tl.load(control + GRAD_SCALE)
    max_norm = tl.load(control + MAX_NORM)
    square_sum = tl.load(control + SQUARE_SUM)
    # Each program decides by itself, from what no program writes: there is no order between them.
    stop = tl.load(control + FOUND_INF) != 0.0
    stop = stop | ((tl.load(control + SKIP_NONFINITE) != 0.0) & (square_sum - square_sum != 0.0))
    norm = tl.sqrt(square_sum) * grad_scale
    scale = grad_scale
    if max_norm != float("inf"):
        scale = grad_scale * clip_coefficient(norm, max_norm)
    if index == 0:
        tl.store(control + SKIP, tl.where(stop, 1.0, 0.0))
        tl.store(control + NORM, norm)
        tl.store(control + SKIPPED, tl.load(control + SKIPPED) + tl.where(stop, 1.0, 0.0))

    if index < k:
        hyper = hypers + index * 8
        step = tl.load(hyper + 5)
        if step_addresses is not None:
            count = tl.load(step_addresses + index).to(tl.pointer_type(tl.float32))
            counted = tl.load(count) + tl.where(stop, 0.0, 1.0)
            tl.store(count, counted)
            step = counted.to(tl.float64)
        s = adam_scalars(
            tl.load(hyper),
            tl.load(hyper + 1),
            tl.load(hyper + 2),
            tl.load(hyper + 3),
            tl.load(hyper + 4),
            step,
            tl.load(hyper + 6),
            tl.load(hyper + 7),
            scale,
        )
        for field in tl.static_range(9):
            tl.store(scalars + index * 9 + field, s[field])
