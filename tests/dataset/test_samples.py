"""Samples and batches: what carries loss, what is drawn when, and captions that stay true."""

from __future__ import annotations

import hashlib
import re
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
from bitgen.dataset.samples import TrainingSet, _augmented
from bitgen.dataset.tokenizer import Tokenizer
from bitgen.errors import ConfigError

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


def reference_augmented(
    pixels_3SS: np.ndarray, smallest_crop: float, may_mirror: bool, random: np.random.Generator
) -> np.ndarray:
    """What runs were trained with, plainly written."""
    size = pixels_3SS.shape[-1]
    side = size * random.uniform(smallest_crop, 1.0)
    stretch = (4 / 3) ** random.uniform(-0.5, 0.5)
    if smallest_crop == 1:
        stretch = 1.0
    width, height = min(size, side * stretch), min(size, side / stretch)
    left = random.uniform(0, size - width)
    top = random.uniform(0, size - height)
    image = Image.fromarray(np.ascontiguousarray(pixels_3SS.transpose(1, 2, 0)))
    image = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    if may_mirror and random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    contrast = 1 + random.uniform(-1, 1) * 0.15
    brightness = 255 * random.uniform(-1, 1) * 0.15
    table = (np.arange(256) - 127.5) * contrast + 127.5 + brightness
    lit = np.clip(table, 0, 255).astype(np.uint8)[np.asarray(image)]
    return lit.transpose(2, 0, 1)


def reference_sample(
    entry: CaptionedImage, pixels_3SS: np.ndarray, training: TrainingConfig, epoch: int, index: int
) -> tuple[list[int], int, np.ndarray]:
    """Token ids, prefix and picture of a caption sample where one is drawn an epoch."""
    random = np.random.default_rng((training.seed, epoch, index))
    words = entry.captions[int(random.integers(len(entry.captions)))].split()
    num_prompt = 0
    if len(words) > 1 and random.random() < training.prompt_probability:
        num_prompt = len(TOKENIZER.encode(" ".join(words[: random.integers(1, len(words))])))
    ids = TOKENIZER.encode(" ".join(words))
    limit = training.max_caption_tokens
    end = [TOKENIZER.eos_id] if len(ids) < limit else []
    may_mirror = not re.search(r"\b(left|right)\b", " ".join(entry.captions), re.IGNORECASE)
    return (
        [TOKENIZER.bos_id, *ids[:limit], *end],
        1 + min(num_prompt, limit - 1),
        reference_augmented(pixels_3SS, training.smallest_crop, may_mirror, random),
    )


@pytest.fixture
def noisy_pictures(tmp_path: Path) -> list[CaptionedImage]:
    entries = []
    for index in range(24):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3)).astype(np.uint8)
        path = tmp_path / f"noisy{index}.png"
        Image.fromarray(pixels).save(path)
        captions = tuple(
            " ".join(["one  red", *["ball"] * ((index + 3 * k) % 11), "left"[: index % 5]])
            for k in range(1 + index % 4)
        )
        entries.append(CaptionedImage(path=path, image_id=index, captions=captions))
    return entries


@pytest.mark.parametrize("seed", [0, 2**40 + 3])
def test_draws_and_pictures_are_those_that_runs_were_trained_with(
    noisy_pictures: list[CaptionedImage], tmp_path: Path, seed: int
) -> None:
    training = TrainingConfig(prompt_probability=0.4, seed=seed, max_caption_tokens=9)
    samples = make_set(
        noisy_pictures, tmp_path, prompt_probability=0.4, seed=seed, max_caption_tokens=9
    )
    checksum, expected_checksum = hashlib.sha256(), hashlib.sha256()
    for epoch in (0, 5):
        samples.set_epoch(epoch)
        for index, entry in enumerate(noisy_pictures):
            pixels = np.asarray(Image.open(entry.path)).transpose(2, 0, 1)
            ids, num_prefix, picture = reference_sample(entry, pixels, training, epoch, index)
            sample = samples[index]
            assert (sample.input_ids, sample.num_prefix) == (ids, num_prefix)
            assert sample.image is not None and sample.image.is_contiguous()
            checksum.update(sample.image.numpy().tobytes())
            expected_checksum.update(np.ascontiguousarray(picture).tobytes())
    assert checksum.digest() == expected_checksum.digest()


@pytest.mark.parametrize(("size", "smallest_crop"), [(32, 0.5), (33, 1.0), (160, 0.85)])
def test_pictures_of_any_size_are_varied_bit_for_bit(size: int, smallest_crop: float) -> None:
    for seed in range(8):
        pixels = np.random.default_rng(seed).integers(0, 256, (3, size, size)).astype(np.uint8)
        choices = (pixels, smallest_crop, seed % 2 == 0)
        ours = _augmented(*choices, np.random.default_rng(seed))
        theirs = reference_augmented(*choices, np.random.default_rng(seed))
        assert np.array_equal(ours, theirs)
        assert ours.dtype == np.uint8 and ours.flags.writeable


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"captions": "all"},
        {"max_caption_tokens": 5},
        {"seed": 2**70, "prompt_probability": 0.5},
        {"training_mode": False},
    ],
)
def test_lengths_are_those_of_the_samples(
    noisy_pictures: list[CaptionedImage], tmp_path: Path, changes: dict[str, object]
) -> None:
    samples = make_set(noisy_pictures, tmp_path, **changes)  # type: ignore[arg-type]
    found = []
    for epoch in (0, 7):
        lengths = samples.lengths(epoch)
        samples.set_epoch(epoch)
        assert lengths.tolist() == [len(samples[i].input_ids) for i in range(len(samples))]
        found.append(lengths.tolist())
    of_captions = [lengths[: -len(samples.tasks)] for lengths in found]
    assert (of_captions[0] == of_captions[1]) == (changes.get("captions") == "all")


def test_words_of_tasks_are_left_out_in_training_alone_and_never_all(
    noisy_pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    whole = make_set(noisy_pictures, tmp_path, training_mode=False)
    samples = make_set(noisy_pictures, tmp_path, task_word_dropout=0.9)
    first = len(samples) - len(samples.tasks)
    lengths = set()
    for epoch in range(20):
        samples.set_epoch(epoch)
        for offset in range(len(samples.tasks)):
            task_id, *words = samples[first + offset].input_ids
            of_whole = whole[len(whole) - len(whole.tasks) + offset].input_ids
            assert task_id == of_whole[0] and words
            left = iter(of_whole[1:])
            assert all(word in left for word in words)  # in their order
            lengths.add(len(words))
    assert len(lengths) > 1


def test_tasks_come_as_often_as_asked_and_in_validation_once(
    noisy_pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    once, often = (
        make_set(noisy_pictures, tmp_path, task_word_dropout=0.0, robot_repeats=n) for n in (1, 3)
    )
    first, num_tasks = len(once) - len(once.tasks), len(once.tasks)
    assert num_tasks > 1 and len(often) == first + 3 * num_tasks
    of_once = [once[first + number] for number in range(num_tasks)]
    for copy in range(3 * num_tasks):
        expected, found = of_once[copy % num_tasks], often[first + copy]
        assert (found.input_ids, found.robot_labels) == (expected.input_ids, expected.robot_labels)
    assert often.lengths(0).tolist() == [len(often[i].input_ids) for i in range(len(often))]
    checked = make_set(noisy_pictures, tmp_path, training_mode=False, robot_repeats=3)
    assert len(checked) == len(make_set(noisy_pictures, tmp_path, training_mode=False))
    with pytest.raises(ConfigError, match="robot_repeats must be at least 1, got 0"):
        TrainingConfig(robot_repeats=0)


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


def test_inverse_document_frequencies_take_a_pictures_captions_as_one_document(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    found = make_set(pictures, tmp_path).caption_idf()
    documents = [
        {token for caption in entry.captions for token in TOKENIZER.encode(caption)}
        for entry in pictures
    ]
    counts = [sum(token in document for document in documents) for token in range(len(found))]
    assert found.dtype == np.float32 and len(found) == CONFIG.vocab_size
    np.testing.assert_allclose(found, [np.log(6 / max(1, count)) for count in counts], rtol=1e-6)
    assert {0, 1, 5, 6} <= set(counts)


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


def test_image_words_are_those_that_captions_agree_on(
    pictures: list[CaptionedImage], tmp_path: Path
) -> None:
    agreed = replace(pictures[0], captions=("a cup", "the red cup", "a cup on the left"))
    alone = replace(pictures[1], captions=("a ball",))
    words = make_set([agreed, alone], tmp_path)[0].image_words
    # Three captions say "cup", two "the" and "a"; "a" stands in every picture's captions.
    (the_id,) = TOKENIZER.encode("the")
    expected = dict.fromkeys(TOKENIZER.encode("cup"), 2.0) | {the_id: 1.0}
    total = sum(expected.values())
    assert words == pytest.approx({token: n / total for token, n in expected.items()})
    assert set(make_set([agreed, alone], tmp_path)[1].image_words) == set(TOKENIZER.encode("ball"))
