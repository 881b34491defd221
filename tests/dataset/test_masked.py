"""Masked language modelling: shares, what is never hidden or drawn, and draws that stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.images import ImageCache
from bitgen.dataset.masked import TokenMasker, check_objective
from bitgen.dataset.robots import RobotTask
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ConfigError

TEXTS = ["a red ball in the sky", "the ball is red", "a man rides a horse on a beach", "fetch it"]
TOKENIZER = Tokenizer.train(TEXTS * 3, 300)
ORDINARY = TOKENIZER.ordinary_ids()
IGNORED = -100
SENTENCE = [TOKENIZER.bos_id, *np.resize(ORDINARY, 20).tolist(), TOKENIZER.eos_id]


def test_the_shares_are_bert_s() -> None:
    masker = TokenMasker(TOKENIZER, 0.15)
    random = np.random.default_rng(0)
    chosen = masked = kept = other = 0
    per_position = np.zeros(len(SENTENCE))
    rounds = 20_000
    for _ in range(rounds):
        ids, labels = masker(SENTENCE, random)
        for position, (old, new, label) in enumerate(zip(SENTENCE, ids, labels, strict=True)):
            if label == IGNORED:
                assert new == old
                continue
            assert label == old
            per_position[position] += 1
            chosen += 1
            masked += new == TOKENIZER.mask_id
            kept += new == old
            other += new not in (TOKENIZER.mask_id, old)
    # 60,000 choices: three standard deviations are below half a percent point.
    assert chosen / (20 * rounds) == pytest.approx(0.15, abs=0.003)
    assert masked / chosen == pytest.approx(0.8, abs=0.005)
    # A random token is now and then the one that stood there.
    again = 0.1 / len(ORDINARY)
    assert kept / chosen == pytest.approx(0.1 + again, abs=0.005)
    assert other / chosen == pytest.approx(0.1 - again, abs=0.005)
    assert per_position[0] == per_position[-1] == 0
    assert np.allclose(per_position[1:-1] / rounds, 0.15, atol=0.012)


def test_short_rows_keep_the_share_and_lose_at_least_one_token() -> None:
    masker, random = TokenMasker(TOKENIZER, 0.15), np.random.default_rng(1)

    def mean_share(length: int) -> float:
        counts = [
            sum(label != IGNORED for label in masker(SENTENCE[: 1 + length], random)[1])
            for _ in range(6000)
        ]
        assert min(counts) >= 1
        return float(np.mean(counts)) / length

    assert mean_share(9) == pytest.approx(0.15, abs=0.004)  # 1.35 tokens: one or two
    assert mean_share(13) == pytest.approx(0.15, abs=0.004)
    assert mean_share(2) == 0.5


@given(
    st.lists(st.sampled_from(range(TOKENIZER.vocab_size)), min_size=1, max_size=50),
    st.floats(0.01, 0.99),
    st.integers(0, 2**32),
)
def test_special_tokens_are_neither_chosen_nor_drawn(
    row: list[int], probability: float, seed: int
) -> None:
    ids, labels = TokenMasker(TOKENIZER, probability)(row, np.random.default_rng(seed))
    assert len(ids) == len(labels) == len(row)
    for old, new, label in zip(row, ids, labels, strict=True):
        if old in TOKENIZER.special_ids:
            assert (new, label) == (old, IGNORED)
        else:
            assert new == TOKENIZER.mask_id or new in ORDINARY
    if any(token not in TOKENIZER.special_ids for token in row):
        assert any(label != IGNORED for label in labels)


def test_random_tokens_come_from_the_whole_vocabulary() -> None:
    masker, random = TokenMasker(TOKENIZER, 0.5), np.random.default_rng(2)
    drawn = {token for _ in range(8000) for token in masker(SENTENCE, random)[0]}
    assert drawn == {*ORDINARY, TOKENIZER.mask_id, TOKENIZER.bos_id, TOKENIZER.eos_id}


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., TrainingSet]:
    images = []
    for index in range(8):
        path = tmp_path / f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        images.append(CaptionedImage(path, index, tuple(TEXTS[:3])))
    cache = ImageCache(tmp_path / "cache", 32, "crop")
    cache.prepare([image.path for image in images])

    def make(objective: str = "mlm", training_mode: bool = True, **changes: object) -> TrainingSet:
        config = BitGenConfig.preset("nano", image_size=32, attention_mode="bidirectional")
        training = TrainingConfig(objective=objective, **changes)  # type: ignore[arg-type]
        tasks = [RobotTask("fetch it", ("Drone",), None)]
        return TrainingSet(
            images, tasks, cache, TOKENIZER, config, training, ["Drone"], training_mode
        )

    return make


def test_nothing_but_the_hidden_tokens_differs_from_other_training(
    make_set: Callable[..., TrainingSet],
) -> None:
    masked, plain = make_set(task_word_dropout=0.0), make_set("caption", task_word_dropout=0.0)
    for epoch in range(3):
        masked.set_epoch(epoch)
        plain.set_epoch(epoch)
        assert masked.lengths(epoch).tolist() == plain.lengths(epoch).tolist()
        for index in range(8):
            ours, theirs = masked[index], plain[index]
            assert ours.image is not None and theirs.image is not None
            assert torch.equal(ours.image, theirs.image)
            assert ours.image_words == theirs.image_words
            assert ours.num_prefix == len(ours.input_ids) == len(theirs.input_ids)
            assert ours.labels is not None and theirs.labels is None
            restored = [
                new if label == IGNORED else label
                for new, label in zip(ours.input_ids, ours.labels, strict=True)
            ]
            assert restored == theirs.input_ids
        task = masked[8]
        assert task.labels is None and task.input_ids == TOKENIZER.encode_task("fetch it")


def test_each_epoch_hides_anew_and_validation_the_same(
    make_set: Callable[..., TrainingSet],
) -> None:
    training, again = make_set(), make_set()
    rows = []
    for epoch in range(8):
        training.set_epoch(epoch)
        again.set_epoch(epoch)
        rows.append(tuple(training[2].input_ids))
        assert training[2].labels == again[2].labels and again[2].input_ids == list(rows[-1])
    assert len(set(rows)) > 4
    validation = make_set(training_mode=False)
    assert validation[3].labels == make_set(training_mode=False)[3].labels
    assert any(label != IGNORED for label in validation[3].labels or [])


def test_batches_carry_the_labels_and_padding_none(make_set: Callable[..., TrainingSet]) -> None:
    samples = make_set(mlm_probability=0.5)
    chosen = [samples[index] for index in (0, 1, 2, 8)]
    batch = samples.collate(chosen)
    for row, sample in enumerate(chosen):
        length = len(sample.input_ids)
        expected = sample.labels or [IGNORED] * length
        assert batch.labels[row, :length].tolist() == expected
        assert (batch.labels[row, length:] == IGNORED).all()
        assert (batch.input_ids[row, length:] == TOKENIZER.pad_id).all()
    assert not (batch.labels[~batch.attention_mask] != IGNORED).any()


def test_other_modes_and_old_tokenizers_are_refused() -> None:
    prefix = BitGenConfig.preset("nano")
    both = BitGenConfig.preset("nano", attention_mode="bidirectional")
    mlm = TrainingConfig(objective="mlm")
    check_objective(prefix, TrainingConfig())
    check_objective(both, mlm, TOKENIZER)
    with pytest.raises(ConfigError, match="both sides") as caught:
        check_objective(prefix, mlm)
    assert "--attention_mode bidirectional" in (caught.value.remedy or "")
    content = json.loads(TOKENIZER.to_json())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|mask|>"]
    del content["model"]["vocab"]["<|mask|>"]
    old = Tokenizer.from_json(json.dumps(content))
    check_objective(both, TrainingConfig(), old)
    with pytest.raises(ConfigError, match=r"needs the token <\|mask\|>"):
        check_objective(both, mlm, old)
    with pytest.raises(ConfigError, match="both sides"):
        TrainingSet(
            [], [], ImageCache(Path("unused"), 32, "crop"), TOKENIZER, prefix, mlm, [], True
        )
    with pytest.raises(ConfigError, match="mlm_probability"):
        TrainingConfig(mlm_probability=0.0)
