"""Captions that a model in training writes, against the model run on each caption alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from bitgen.dataset.collate import Batch
from bitgen.inference.generate import generate
from bitgen.model.bitgen import BitGenModel
from bitgen.training.caption_sampling import write_captions
from bitgen.training.self_critical import SampledCaptions, lay_out
from tests.conftest import make_lively

BOS, EOS, NEVER = 1, 2, (0, 3)
MAX_TOKENS = 9


def lively_model(make_config: Any, **changes: Any) -> BitGenModel:
    torch.manual_seed(0)
    model = BitGenModel(make_config(vocab_size=40, num_layers=2, **changes)).eval()
    make_lively(model)
    return model


def pictures(number: int) -> torch.Tensor:
    return torch.randn(number, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def batch_of(number: int) -> Batch:
    """Rows of `<bos>`, one word and the end."""
    ids = torch.tensor([[BOS, 7, EOS]] * number)
    return Batch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids).bool(),
        labels=torch.tensor([[-100, 7, EOS]] * number),
        prefix_lengths=torch.ones(number, dtype=torch.long),
        images=None,
        image_mask=torch.ones(number, dtype=torch.bool),
        robot_labels=torch.zeros(number, 0),
        word_ids=torch.zeros(number, 0, dtype=torch.long),
        word_weights=torch.zeros(number, 0),
        pictures=torch.arange(number),
        is_plan=torch.zeros(number, dtype=torch.bool),
    )


def laid_out(
    captions: list[list[list[int]]], rewards: np.ndarray, with_references: bool = False
) -> SampledCaptions:
    number = len(captions)
    every = torch.ones(number, dtype=torch.bool)
    return lay_out(batch_of(number), every, captions, rewards, with_references, BOS, 0)


def log_probability(model: BitGenModel, image: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """Of each token of one caption, alone in a row."""
    given = torch.tensor([[BOS, *ids[:-1]]])
    mask = model.build_attention_mask(torch.ones_like(given), prefix_lengths_B=torch.tensor([1]))
    logits = model(given, images=image[None], attention_mask=mask).logits[0]
    return -functional.cross_entropy(logits, torch.tensor(ids), reduction="none")


@pytest.mark.parametrize("mode", ["prefix", "causal"])
def test_captions_side_by_side_are_scored_as_each_alone(make_config: Any, mode: str) -> None:
    model = lively_model(make_config, attention_mode=mode, quantization="none", num_kv_heads=1)
    images = pictures(3)
    torch.manual_seed(1)
    captions = write_captions(model, images, BOS, EOS, MAX_TOKENS, NEVER, num_captions=4)
    found = laid_out(captions, np.zeros((3, 4)), with_references=True)
    logits = model(
        found.input_ids_RL, images=images, attention_mask=found.attention_mask(model)
    ).logits.flatten(0, 1)[found.sources_M]
    scored = -functional.cross_entropy(logits, found.targets_M, reduction="none")
    alone = [
        log_probability(model, image, ids)
        for image, of_picture in zip(images, captions, strict=True)
        for ids in (*of_picture, [7, EOS])
    ]
    torch.testing.assert_close(scored, torch.cat(alone), atol=1e-4, rtol=0)
    assert found.num_captions == 12
    assert found.num_tokens == sum(len(ids) for of_picture in captions for ids in of_picture)


@pytest.mark.parametrize("quantization", ["ternary", "none"])
def test_greedy_captions_are_those_of_generate(make_config: Any, quantization: str) -> None:
    model = lively_model(make_config, quantization=quantization)
    images = pictures(4)
    written = write_captions(model, images, BOS, EOS, MAX_TOKENS, NEVER, greedy=True)
    expected = generate(model, images, [[BOS]] * 4, EOS, MAX_TOKENS, never_ids=NEVER)
    words = [[token for token in ids if token != EOS] for (ids,) in written]
    assert words == [generation.tokens for generation in expected]
    assert [ids[-1] == EOS for (ids,) in written] == [g.finished for g in expected]


def test_tokens_are_drawn_as_often_as_the_model_says(make_config: Any) -> None:
    model = lively_model(make_config, quantization="none")
    with torch.no_grad():
        model.text_decoder.norm.weight.fill_(0.2)  # nearer to chance: more than one first word
    image = pictures(1)
    torch.manual_seed(2)
    drawn = write_captions(model, image, BOS, EOS, 2, NEVER, num_captions=4000)[0]
    assert not {token for ids in drawn for token in ids} & set(NEVER)
    mask = model.build_attention_mask(torch.ones(1, 1), prefix_lengths_B=torch.tensor([1]))
    logits = model(torch.tensor([[BOS]]), images=image, attention_mask=mask).logits[0, 0]
    logits[list(NEVER)] = -torch.inf
    expected = logits.softmax(dim=0)
    counts = torch.bincount(torch.tensor([ids[0] for ids in drawn]), minlength=len(expected))
    assert int((expected > 0.01).sum()) > 3
    error = (expected * (1 - expected) / 4000).sqrt()
    assert bool(((counts / 4000 - expected).abs() <= 5 * error + 1e-3).all())


def test_what_is_drawn_depends_on_torchs_seed_and_on_nothing_else(make_config: Any) -> None:
    model = lively_model(make_config, dropout=0.5).train()
    images = pictures(2)

    def draw(seed: int) -> list[list[list[int]]]:
        torch.manual_seed(seed)
        return write_captions(model, images, BOS, EOS, MAX_TOKENS, NEVER, num_captions=3)

    assert draw(0) == draw(0) != draw(1)
    assert model.training
    state = torch.get_rng_state()
    write_captions(model, images, BOS, EOS, MAX_TOKENS, NEVER, greedy=True)
    assert torch.equal(state, torch.get_rng_state())


def test_captions_may_be_as_long_as_the_model_has_positions(make_config: Any) -> None:
    model = lively_model(make_config, max_positions=4 + MAX_TOKENS, quantization="none")
    assert model.num_image_tokens == 4
    captions = write_captions(
        model, pictures(2), BOS, EOS, MAX_TOKENS, [*NEVER, EOS], num_captions=5
    )
    assert {len(ids) for of_picture in captions for ids in of_picture} == {MAX_TOKENS}
