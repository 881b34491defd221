"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate_at(
    step: int,
    *,
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    pretraining_steps: int = 0,
) -> float:
    """Learning rate of update `step`, counted from 0: linear warm-up, then half a cosine.

    The warm-up ends at `peak` with update `warmup_steps - 1`; the cosine (Loshchilov & Hutter,
    arXiv 1608.03983, without restarts) reaches `minimum` with update `total_steps - 1` and stays
    there. A `minimum` above `peak` counts as `peak`, so that the rate never rises after warm-up.
    Pretraining steps come before all this, with a warm-up and a cosine of their own.
    """
    if step < pretraining_steps:
        total_steps = pretraining_steps
    else:
        step, total_steps = step - pretraining_steps, total_steps - pretraining_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    minimum = min(minimum, peak)
    decay_steps = total_steps - warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / max(1, decay_steps))
    return minimum + 0.5 * (peak - minimum) * (1.0 + math.cos(math.pi * progress))
