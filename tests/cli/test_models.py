"""Options that commands share: how captions are searched where nothing is said."""

from __future__ import annotations

import pytest

from bitgen.cli.models import DEFAULT_BEAMS, with_beams
from bitgen.config import BitGenConfig
from bitgen.inference.options import CaptionOptions

ONE = BitGenConfig.preset("nano")
FOUR = BitGenConfig.preset("nano", predict_tokens=4)


@pytest.mark.parametrize(
    ("options", "config", "expected"),
    [
        (CaptionOptions(), ONE, DEFAULT_BEAMS),
        (CaptionOptions(temperature=0.5), ONE, 1),
        (CaptionOptions(speculative=True), FOUR, 1),
        (CaptionOptions(), FOUR, 1),
        (CaptionOptions(speculative=False), FOUR, DEFAULT_BEAMS),
    ],
    ids=["beams", "drawn", "drafted", "has heads", "drafts refused"],
)
def test_beams_where_none_are_asked_for(
    options: CaptionOptions, config: BitGenConfig, expected: int
) -> None:
    assert with_beams(options, None, config).beam_size == expected


def test_beams_that_are_asked_for_are_taken_or_refused() -> None:
    assert with_beams(CaptionOptions(), 1, ONE).beam_size == 1
    assert with_beams(CaptionOptions(), 5, FOUR).beam_size == 5
