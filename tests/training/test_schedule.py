from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgen.training.schedule import COOLDOWN_SHARE, learning_rate_at, weight_decay_at


def rates(
    peak: float, minimum: float, warmup: int, total: int, schedule: str = "cosine"
) -> list[float]:
    return [
        learning_rate_at(
            step,
            peak=peak,
            minimum=minimum,
            warmup_steps=warmup,
            total_steps=total,
            schedule=schedule,
        )
        for step in range(total)
    ]


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert rates(1.0, 0.1, 4, 20)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_the_cosine_is_half_way_in_the_middle_and_ends_at_the_minimum() -> None:
    values = rates(1.0, 0.2, 0, 10)
    assert values[4] == pytest.approx(0.6)
    assert values[-1] == pytest.approx(0.2)


def test_after_the_end_the_rate_stays_at_the_minimum() -> None:
    rate = learning_rate_at(50, peak=1.0, minimum=0.2, warmup_steps=2, total_steps=10)
    assert rate == pytest.approx(0.2)


def test_a_minimum_above_the_peak_does_not_raise_the_rate() -> None:
    assert max(rates(1e-6, 1e-5, 2, 10)) == pytest.approx(1e-6)


@given(
    peak=st.floats(1e-6, 1.0),
    share=st.floats(0.0, 1.0),
    warmup=st.integers(0, 60),
    total=st.integers(1, 50),
    schedule=st.sampled_from(["cosine", "two_stage"]),
)
def test_it_rises_then_falls_and_stays_within_bounds(
    peak: float, share: float, warmup: int, total: int, schedule: str
) -> None:
    values = rates(peak, peak * share, warmup, total, schedule)
    rising, falling = values[:warmup], values[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < value <= peak * (1 + 1e-9) for value in rising)
    assert all(peak * share * (1 - 1e-9) <= value <= peak * (1 + 1e-9) for value in falling)


def test_pretraining_is_a_schedule_of_its_own_before_everything() -> None:
    options = {"peak": 1.0, "minimum": 0.0, "warmup_steps": 4}
    rates = [
        learning_rate_at(step, **options, total_steps=30, pretraining_steps=10)
        for step in range(30)
    ]
    assert rates[:10] == [learning_rate_at(step, **options, total_steps=10) for step in range(10)]
    assert rates[10:] == [learning_rate_at(step, **options, total_steps=20) for step in range(20)]


def test_two_stages_are_a_cosine_then_a_lower_one_from_the_middle_on() -> None:
    cosine, staged = rates(1.0, 0.0, 10, 200), rates(1.0, 0.0, 10, 200, "two_stage")
    assert staged[:100] == cosine[:100]
    assert staged[99] > COOLDOWN_SHARE > staged[100] > 0.99 * COOLDOWN_SHARE
    assert all(low < high for low, high in zip(cosine[110:199], staged[110:199], strict=True))
    assert staged[149] == pytest.approx(COOLDOWN_SHARE / 2)
    assert staged[-1] == pytest.approx(0.0, abs=1e-12)


def test_weight_decay_ends_with_the_first_stage_of_two() -> None:
    def decays(schedule: str, pretraining_steps: int = 0) -> list[float]:
        return [
            weight_decay_at(
                step,
                peak=0.1,
                total_steps=10 + pretraining_steps,
                pretraining_steps=pretraining_steps,
                schedule=schedule,
            )
            for step in range(10 + pretraining_steps)
        ]

    assert decays("cosine", 4) == [0.1] * 14
    assert decays("two_stage") == [0.1] * 5 + [0.0] * 5
    assert decays("two_stage", 4) == [0.1] * 9 + [0.0] * 5
