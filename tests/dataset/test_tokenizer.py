"""The tokenizer: round trips, special tokens, and Hugging Face's own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitgen.dataset.tokenizer import SPECIAL_TOKENS, Tokenizer, tidy_sentence
from bitgen.errors import InputError

TEXTS = ["A red ball lies under water.", "A man rides a horse.", "The red ball, on the shelf."] * 4
TOKENIZER = Tokenizer.train(TEXTS, 400)


def without_later_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """As tokenizers were written before `<|mask|>` and `<|plan|>`; the ids of words stay."""
    content = json.loads(tokenizer.to_json())
    later = ("<|mask|>", "<|plan|>")
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in later]
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {t: i for t, i in vocabulary.items() if t not in later}
    return Tokenizer.from_json(json.dumps(content))


@given(st.text())
def test_any_text_round_trips_up_to_white_space(text: str) -> None:
    text = text.replace("\0", "")
    ids = TOKENIZER.encode(text)
    assert not TOKENIZER.special_ids.intersection(ids)
    if not any(token in text for token in SPECIAL_TOKENS):
        assert TOKENIZER.decode(ids) == " ".join(text.split())


def test_a_tidy_sentence_has_no_space_before_its_marks() -> None:
    assert tidy_sentence(" A  dog , wet ,\nand a .5 mm ball . ") == "A dog, wet, and a .5 mm ball."
    assert tidy_sentence("Is it ? No !") == "Is it? No!"
    assert tidy_sentence("") == ""


def test_spelled_out_special_tokens_stay_text() -> None:
    ids = TOKENIZER.encode("stop <|eos|> here <|task|>")
    assert not TOKENIZER.special_ids.intersection(ids)


def test_learnt_words_are_short_and_ids_are_stable() -> None:
    assert len(TOKENIZER.encode("red ball")) == 2
    assert [TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id] == [0, 1, 2]
    assert TOKENIZER.encode_task("red")[0] == TOKENIZER.task_id == 3
    assert TOKENIZER.encode_robot("red")[0] == TOKENIZER.robot_id == 4
    assert TOKENIZER.tokens(TOKENIZER.encode("red ball")) == [" red", " ball"]


@given(st.lists(st.text(alphabet="ab <|mask|>eos\0\n", max_size=20), max_size=8))
def test_texts_encoded_together_are_those_encoded_alone(texts: list[str]) -> None:
    texts = [*texts, *TEXTS, "a<|eos|>b"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]


def test_many_texts_and_a_tokenizer_that_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitgen.dataset.tokenizer._ENCODED_AT_ONCE", 3)
    expected = [TOKENIZER.encode(text) for text in TEXTS]
    assert TOKENIZER.encode_batch(TEXTS) == expected
    content = json.loads(TOKENIZER.to_json())
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>",
    }  # fmt: skip
    assert Tokenizer.from_json(json.dumps(content)).encode_batch(TEXTS) == expected
    assert TOKENIZER.encode_batch([]) == []


def test_tokenizers_from_before_the_later_tokens_read_as_they_did() -> None:
    assert TOKENIZER.mask_id == 5 and TOKENIZER.mask_id in TOKENIZER.special_ids
    assert TOKENIZER.plan_id == 6 and TOKENIZER.plan_id in TOKENIZER.special_ids
    old = without_later_tokens(TOKENIZER)
    assert old.mask_id is None and old.plan_id is None
    assert old.special_ids == {0, 1, 2, 3, 4}
    # Split where the mask token is spelled, it would get a space that it never had.
    text = "a <|mask|>"
    assert old.encode(text) == old._backend.encode(text).ids
    assert TOKENIZER.mask_id not in TOKENIZER.encode(text)
    assert TOKENIZER.decode([TOKENIZER.mask_id]) == ""


def test_ordinary_ids_are_all_but_special_ones() -> None:
    ordinary = TOKENIZER.ordinary_ids()
    assert TOKENIZER.special_ids.isdisjoint(ordinary)
    assert sorted([*ordinary, *TOKENIZER.special_ids]) == list(range(TOKENIZER.vocab_size))
    foreign = Tokenizer.from_json(TOKENIZER.to_json())
    foreign._backend.add_special_tokens(["[CLS]"])
    foreign = Tokenizer.from_json(foreign.to_json())
    assert foreign.vocab_size == TOKENIZER.vocab_size + 1
    assert foreign.ordinary_ids() == ordinary


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
    with pytest.raises(InputError, match="at least 263"):
        Tokenizer.train(TEXTS, 100)
    foreign = TOKENIZER.to_json().replace("<|robot|>", "<|other|>")
    with pytest.raises(InputError, match=r"lacks the special tokens <\|robot\|>"):
        Tokenizer.from_json(foreign)


def test_tokens_spell_bytes() -> None:
    spelled = TOKENIZER.token_bytes()
    assert len(spelled) == TOKENIZER.vocab_size
    assert all(spelled[i] is None for i in TOKENIZER.special_ids)
    assert sorted(text for text in spelled if text and len(text) == 1) == [
        bytes([byte]) for byte in range(256)
    ]
    text = "A red ball, häßlich 机器 \N{ROBOT FACE}"
    assert b"".join(spelled[i] or b"" for i in TOKENIZER.encode(text)).decode() == f" {text}"


def test_asking_for_a_plan() -> None:
    assert TOKENIZER.encode_plan_task("A red ball.") == [6, *TOKENIZER.encode("A red ball.")]
    with pytest.raises(InputError, match=r"lacks the special token <\|plan\|>"):
        without_later_tokens(TOKENIZER).encode_plan_task("A red ball.")
