"""Learning rate and weight decay as pure functions of the step."""

from __future__ import annotations

import math

COOLDOWN_SHARE = 0.5
"""Learning rate with which the second stage starts, of the peak: where the first one ends.

A drop in between (arXiv 2504.12285 has one, and does not say how deep) was measured to cost more
than it brings in short trainings (docs/training.md)."""


def learning_rate_at(
    step: int,
    *,
    peak: float,
    minimum: float,
    warmup_steps: int,
    total_steps: int,
    pretraining_steps: int = 0,
    schedule: str = "cosine",
) -> float:
    """Learning rate of update `step`, counted from 0: linear warm-up, then the schedule.

    The warm-up ends at `peak` with update `warmup_steps - 1`; the cosine (Loshchilov & Hutter,
    arXiv 1608.03983, without restarts) reaches `minimum` with update `total_steps - 1` and stays
    there. "two_stage" (BitNet b1.58 2B4T, arXiv 2504.12285, section 3.1) follows the same cosine
    in its first half; in its second a cosine that starts at `COOLDOWN_SHARE` of the peak.
    A `minimum` above `peak` counts as `peak`, so that the rate never rises after warm-up.
    Pretraining steps come before all this, with a warm-up and a cosine of their own.
    """
    if step < pretraining_steps:
        total_steps, schedule = pretraining_steps, "cosine"
    else:
        step, total_steps = step - pretraining_steps, total_steps - pretraining_steps
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    minimum = min(minimum, peak)
    middle = max(total_steps // 2, warmup_steps)
    if schedule == "two_stage" and step >= middle:
        end_of_first = _cosine(middle, peak, minimum, warmup_steps, total_steps)
        start = min(max(COOLDOWN_SHARE * peak, minimum), end_of_first)
        return _cosine(step, start, minimum, middle, total_steps)
    return _cosine(step, peak, minimum, warmup_steps, total_steps)


def weight_decay_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    pretraining_steps: int = 0,
    schedule: str = "cosine",
) -> float:
    """Weight decay of update `step`, counted from 0.

    Constant, except that "two_stage" switches it off in the second half: weights then settle on
    their ternary values (arXiv 2504.12285, section 3.1).
    """
    if schedule == "two_stage" and step >= pretraining_steps:
        step, total_steps = step - pretraining_steps, total_steps - pretraining_steps
        return peak if step < total_steps // 2 else 0.0
    return peak


def _cosine(step: int, start: float, end: float, first: int, total: int) -> float:
    progress = min(1.0, (step - first + 1) / max(1, total - first))
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * progress))
