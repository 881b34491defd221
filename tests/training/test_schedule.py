from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgen.training.schedule import learning_rate_at


def rates(peak: float, minimum: float, warmup: int, total: int) -> list[float]:
    return [
        learning_rate_at(step, peak=peak, minimum=minimum, warmup_steps=warmup, total_steps=total)
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
)
def test_it_rises_then_falls_and_stays_within_bounds(
    peak: float, share: float, warmup: int, total: int
) -> None:
    values = rates(peak, peak * share, warmup, total)
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
