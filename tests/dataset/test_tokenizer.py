"""The tokenizer: round trips, special tokens, and Hugging Face's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgen.dataset.tokenizer import SPECIAL_TOKENS, Tokenizer
from bitgen.errors import InputError

TEXTS = ["A red ball lies under water.", "A man rides a horse.", "The red ball, on the shelf."] * 4
TOKENIZER = Tokenizer.train(TEXTS, 400)


@given(st.text())
def test_any_text_round_trips_up_to_white_space(text: str) -> None:
    text = text.replace("\0", "")
    ids = TOKENIZER.encode(text)
    assert not TOKENIZER.special_ids.intersection(ids)
    if not any(token in text for token in SPECIAL_TOKENS):
        assert TOKENIZER.decode(ids) == " ".join(text.split())


def test_spelled_out_special_tokens_stay_text() -> None:
    ids = TOKENIZER.encode("stop <|eos|> here <|task|>")
    assert not TOKENIZER.special_ids.intersection(ids)


def test_learnt_words_are_short_and_ids_are_stable() -> None:
    assert len(TOKENIZER.encode("red ball")) == 2
    assert [TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id] == [0, 1, 2]
    assert TOKENIZER.encode_task("red")[0] == TOKENIZER.task_id == 3
    assert TOKENIZER.encode_robot("red")[0] == TOKENIZER.robot_id == 4
    assert TOKENIZER.tokens(TOKENIZER.encode("red ball")) == [" red", " ball"]


def test_json_round_trips_and_hugging_face_opens_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json(), encoding="utf-8")
    text = "A red ball rides a horse."
    expected = TOKENIZER.encode(text)
    assert Tokenizer.load(path).encode(text) == expected
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert theirs(text)["input_ids"] == expected
    assert theirs.decode(expected).strip() == text


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="not a Hugging Face tokenizer"):
        Tokenizer.from_json("{}")
    with pytest.raises(InputError, match="at least 261"):
        Tokenizer.train(TEXTS, 100)
    foreign = TOKENIZER.to_json().replace("<|robot|>", "<|other|>")
    with pytest.raises(InputError, match=r"lacks the special tokens <\|robot\|>"):
        Tokenizer.from_json(foreign)
