"""The small model as a fixture."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bitgen.model.bitgen import BitGenModel

from .small_model import small_model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., BitGenModel]:
    return small_model
