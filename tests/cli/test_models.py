"""Options that commands share: how captions are found where nothing is said."""

from __future__ import annotations

import pytest

from bitgen.cli.models import DEFAULT_BEAMS, DEFAULT_CONSENSUS, with_decoding
from bitgen.config import BitGenConfig
from bitgen.errors import InputError
from bitgen.inference.options import CaptionOptions

ONE = BitGenConfig.preset("nano")
FOUR = BitGenConfig.preset("nano", predict_tokens=4)


@pytest.mark.parametrize(
    ("options", "config", "beam_size", "consensus"),
    [
        (CaptionOptions(), ONE, 1, DEFAULT_CONSENSUS),
        (CaptionOptions(seed=3), ONE, 1, DEFAULT_CONSENSUS),
        (CaptionOptions(length_penalty=0.5), ONE, DEFAULT_BEAMS, 0),
        (CaptionOptions(temperature=0.5), ONE, 1, 0),
        (CaptionOptions(speculative=True), FOUR, 1, 0),
        (CaptionOptions(), FOUR, 1, 0),
        (CaptionOptions(speculative=False), FOUR, 1, DEFAULT_CONSENSUS),
    ],
    ids=["consensus", "seed", "penalty", "drawn", "drafted", "has heads", "drafts refused"],
)
def test_where_neither_beams_nor_a_consensus_are_asked_for(
    options: CaptionOptions, config: BitGenConfig, beam_size: int, consensus: int
) -> None:
    found = with_decoding(options, None, None, config)
    assert (found.beam_size, found.consensus) == (beam_size, consensus)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((1, None), (1, 0)),
        ((5, None), (5, 0)),
        ((5, 0), (5, 0)),
        ((None, 8), (1, 8)),
        ((1, 8), (1, 8)),
    ],
)
def test_what_is_asked_for_is_taken(
    asked: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    for config in (ONE, FOUR):
        found = with_decoding(CaptionOptions(), *asked, config)
        assert (found.beam_size, found.consensus) == expected


def test_no_consensus_means_beams() -> None:
    assert with_decoding(CaptionOptions(), None, 0, ONE).beam_size == DEFAULT_BEAMS
    assert with_decoding(CaptionOptions(), None, 0, FOUR).beam_size == 1
    with pytest.raises(InputError, match="no beams"):
        with_decoding(CaptionOptions(), 5, 8, ONE)
