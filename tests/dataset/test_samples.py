"""Samples and batches: what carries loss, what is drawn when, and captions that stay true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.coco import CaptionedImage
from bitgen.dataset.collate import Collator, Sample
from bitgen.dataset.images import ImageCache
from bitgen.dataset.robots import RobotTask
from bitgen.dataset.samples import TrainingSet
from bitgen.dataset.tokenizer import Tokenizer

ROBOTS = ("Drone", "Humanoid")
CAPTIONS = ("a red ball in the sky", "the ball is red", "one red ball")
TOKENIZER = Tokenizer.train([*CAPTIONS, "fetch it", "a cup left of a ball"] * 3, 300)
CONFIG = BitGenConfig.preset("nano", image_size=32)


@pytest.fixture
def pictures(tmp_path: Path) -> list[CaptionedImage]:
    entries = []
    for index in range(6):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[:, :16, 0] = 255  # red on the left half alone
        path = tmp_path / f"{index}.png"
        Image.fromarray(pixels).save(path)
        captions = CAPTIONS if index else ("a cup left of a ball",)
        entries.append(CaptionedImage(path=path, image_id=index, captions=captions))
    return entries


def make_set(
    pictures: list[CaptionedImage], tmp_path: Path, training_mode: bool = True, **changes: object
) -> TrainingSet:
    cache = ImageCache(tmp_path / "cache", 32, "crop")
    assert cache.prepare([entry.path for entry in pictures]) == {}
    tasks = [
        RobotTask("fetch it", ("Humanoid",), pictures[1].path),
        RobotTask("fetch it", ("Drone", "Humanoid"), None),
    ]
    training = replace(TrainingConfig(prompt_probability=0.0), **changes)
    return TrainingSet(pictures, tasks, cache, TOKENIZER, CONFIG, training, ROBOTS, training_mode)


def test_one_caption_an_epoch_or_all(pictures: list[CaptionedImage], tmp_path: Path) -> None:
    one = make_set(pictures, tmp_path)
    assert len(one) == 6 + 2
    seen = set()
    for epoch in range(20):
        one.set_epoch(epoch)
        seen.add(TOKENIZER.decode(one[3].input_ids))
    assert seen == set(CAPTIONS)
    everything = make_set(pictures, tmp_path, captions="all")
    assert len(everything) == 1 + 5 * 3 + 2
    assert {TOKENIZER.decode(everything[i].input_ids) for i in range(1, 4)} == set(CAPTIONS)


def test_draws_depend_on_seed_epoch_and_index_alone(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    first, again = make_set(pictures, tmp_path), make_set(pictures, tmp_path)
    first.set_epoch(3)
    again.set_epoch(3)
    _ = first[5], first[1]
    assert first[2].input_ids == again[2].input_ids
    assert torch.equal(first[2].image, again[2].image)
    again.set_epoch(4)
    assert not torch.equal(first[2].image, again[2].image)


def test_validation_is_never_augmented(pictures: list[CaptionedImage], tmp_path: Path) -> None:
    validation = make_set(pictures, tmp_path, training_mode=False, prompt_probability=0.9)
    raw = np.asarray(Image.open(pictures[2].path)).transpose(2, 0, 1)
    assert np.array_equal(validation[2].image.numpy(), raw)
    assert validation[2].num_prefix == 1


def test_a_picture_is_not_mirrored_where_its_words_name_a_side(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    training = make_set(pictures, tmp_path)

    def is_mirrored(index: int) -> bool:
        red = training[index].image[0].float()
        return bool(red[:, 24:].mean() > red[:, :8].mean())

    mirrored = {0: 0, 1: 0}
    for epoch in range(30):
        training.set_epoch(epoch)
        for index in mirrored:
            mirrored[index] += is_mirrored(index)
    assert mirrored[0] == 0
    assert 5 <= mirrored[1] <= 25


def test_a_prompt_is_the_beginning_of_the_caption_and_carries_no_loss(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    training = make_set(pictures, tmp_path, prompt_probability=0.999)
    for epoch in range(10):
        training.set_epoch(epoch)
        sample = training[4]
        assert sample.input_ids[0] == TOKENIZER.bos_id
        assert sample.input_ids[-1] == TOKENIZER.eos_id
        assert 1 < sample.num_prefix < len(sample.input_ids) - 1
        prompt = TOKENIZER.decode(sample.input_ids[: sample.num_prefix])
        assert any(caption.startswith(prompt + " ") for caption in CAPTIONS)


def test_long_captions_are_cut_without_an_end(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    sample = make_set(pictures, tmp_path, max_caption_tokens=2)[3]
    assert len(sample.input_ids) == 3
    assert TOKENIZER.eos_id not in sample.input_ids


def test_tasks_carry_robot_labels_and_no_caption_loss(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    training = make_set(pictures, tmp_path)
    with_picture, without = training[6], training[7]
    assert with_picture.robot_labels == (0.0, 1.0)
    assert without.robot_labels == (1.0, 1.0)
    assert with_picture.image is not None and without.image is None
    assert with_picture.num_prefix == len(with_picture.input_ids)
    with pytest.raises(IndexError):
        training[8]


def test_collate_pads_labels_and_masks_what_is_not_there() -> None:
    image = torch.ones(3, 4, 4, dtype=torch.uint8)
    batch = Collator(pad_id=0, num_robots=2)(
        [Sample([1, 7, 8, 9, 2], 2, image), Sample([3, 7], 2, None, (0.0, 1.0))]
    )
    assert batch.input_ids.tolist() == [[1, 7, 8, 9, 2, 0, 0, 0], [3, 7, 0, 0, 0, 0, 0, 0]]
    assert batch.attention_mask.sum(dim=1).tolist() == [5, 2]
    ignored = -100
    assert batch.labels[0].tolist() == [ignored, ignored, 8, 9, 2, ignored, ignored, ignored]
    assert (batch.labels[1] == ignored).all()
    assert batch.prefix_lengths.tolist() == [2, 2]
    assert batch.image_mask.tolist() == [True, False]
    assert batch.images is not None and not batch.images[1].any()
    assert batch.robot_labels[0].isnan().all()
    assert batch.robot_labels[1].tolist() == [0.0, 1.0]
    assert batch.to("cpu").labels.shape == (2, 8)
    text_only = Collator(pad_id=0, num_robots=0)([Sample([1, 5], 1, None)])
    assert text_only.images is None and text_only.robot_labels.shape == (1, 0)


def test_image_words_weigh_what_tells_pictures_apart(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    training = make_set(pictures, tmp_path)
    cup, ball = training[0].image_words, training[2].image_words
    assert sum(cup.values()) == pytest.approx(1) == sum(ball.values())
    (a_id,) = TOKENIZER.encode("a")
    cup_ids, ball_ids = TOKENIZER.encode("cup"), TOKENIZER.encode("ball")
    # "a" and "ball" stand in every picture's captions, "cup" in one alone.
    assert a_id not in cup and not set(ball_ids) & set(cup)
    assert max(cup, key=lambda token: cup[token]) in [*cup_ids, *TOKENIZER.encode("left of")]
    assert training[6].image_words == {}
    batch = training.collate([training[0], training[6]])
    assert batch.word_weights[0].sum() == pytest.approx(1)
    assert not batch.word_weights[1].any()
    assert make_set(pictures, tmp_path, training_mode=False)[0].image_words == {}
