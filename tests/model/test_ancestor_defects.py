"""One test for each way in which this model's ancestors got a mask wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bitgen.model.attention import masked_attention
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask, mask_value

MakeModel = Callable[..., BitGenModel]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def some_ids(batch: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(5, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def some_images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_forward_that_took_no_mask(make_model: MakeModel) -> None:
    """A mask that forbids something changes the answer, in the model and in every single layer."""
    model, ids, images = make_model(), some_ids(), some_images()
    valid = torch.ones_like(ids)
    valid[0, -1] = 0
    both_ways = make_model(attention_mode="bidirectional")
    seen, unseen = both_ways(ids, images).logits, both_ways(ids, images, valid).logits
    assert not torch.allclose(seen[0, 0], unseen[0, 0], **CLOSE)
    torch.testing.assert_close(seen[1], unseen[1], **CLOSE)
    x_BSC = torch.randn(2, 6, 32)
    blind = AttentionMask.custom(torch.eye(6, dtype=torch.bool))
    for layer in [*model.text_decoder.layers, *model.image_encoder.layers]:
        seeing, *_ = layer(x_BSC, AttentionMask.bidirectional())
        assert not torch.allclose(layer(x_BSC, blind)[0], seeing, **CLOSE)


@torch.no_grad()
def test_a_mask_that_was_applied_to_embeddings_instead_of_scores(make_model: MakeModel) -> None:
    """A masked key has weight 0: what its embedding holds, zero or not, changes nothing."""
    model, ids = make_model(), some_ids()
    valid = torch.ones_like(ids)
    valid[:, -3:] = 0
    weights = model(ids, attention_mask=valid, return_analysis_data=True).attentions
    for layer in weights:
        assert (layer[..., -3:] == 0).all()
        assert torch.allclose(layer[:, :, :-3].sum(-1), torch.ones(()))
    before = model(ids, attention_mask=valid).logits[:, :-3]
    model.text_decoder.embed_tokens.weight[0] = 7.0  # as the head, it moves logit 0 alone
    after = model(ids * valid, attention_mask=valid).logits[:, :-3]
    assert torch.equal(before[..., 1:], after[..., 1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("return_weights", [False, True])
def test_a_hard_coded_minus_1e9_that_overflowed_fp16(
    dtype: torch.dtype, return_weights: bool
) -> None:
    """Masks are finite in their own dtype; a given -1e9 forbids, and a row of them gives zeros."""
    assert torch.tensor(mask_value(dtype), dtype=dtype).isfinite()
    assert AttentionMask.causal().to_additive(4, 4, dtype).isfinite().all()
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(3, 1, 2, 4, 8, generator=generator).to(dtype).requires_grad_()
    additive = torch.zeros(4, 4)
    additive[0] = additive[2, 1:] = -1e9
    mask = AttentionMask.from_tensor(additive[None, None])
    attended, weights = masked_attention(*qkv, mask, return_weights)
    assert (attended[:, :, 0] == 0).all()
    assert torch.equal(attended[:, :, 2], qkv[2][:, :, 0])  # row 2 sees key 0 alone
    assert weights is None or (weights[:, :, 0] == 0).all()
    (gradient,) = torch.autograd.grad(attended.float().square().sum(), qkv)
    assert attended.isfinite().all() and gradient.isfinite().all()
    assert (gradient[0][:, :, 0] == 0).all()


@torch.no_grad()
def test_a_cache_whose_causal_mask_forgot_its_offset(make_model: MakeModel) -> None:
    """In a later step of several tokens each sees all that is held, and none sees the next."""
    model, ids = make_model(), some_ids()
    whole = model(ids, return_analysis_data=True)
    cache = model.new_cache(2, 9)
    model(ids[:, :4], attention_cache=cache)
    step = model(ids[:, 4:], attention_cache=cache, return_analysis_data=True)
    torch.testing.assert_close(step.logits, whole.logits[:, 4:], **CLOSE)
    for cached, uncached in zip(step.attentions, whole.attentions, strict=True):
        assert (cached[..., :4] > 0).all()
        torch.testing.assert_close(cached, uncached[:, :, 4:], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("left_padding", [0, 2])
def test_a_cache_that_lost_its_sinks(make_model: MakeModel, left_padding: int) -> None:
    """The first tokens of each row, not the first columns, keep their weight to the end."""
    model, ids = make_model(), some_ids(length=12)
    valid = torch.ones_like(ids)
    valid[1, :left_padding] = 0
    rules = AttentionMask.sliding_window(window=3, sinks=2)
    whole = model(
        ids, attention_mask=rules & AttentionMask.padding(valid), return_analysis_data=True
    )
    for layer in whole.attentions:
        assert (layer[0, :, -1, :2] > 0).all() and (layer[0, :, -1, 2:9] == 0).all()
        first = left_padding
        assert (layer[1, :, -1, first : first + 2] > 0).all()
        assert (layer[1, :, -1, first + 2 : 9] == 0).all()
    cache = model.new_sliding_window_cache(2, window=3, sinks=2)
    steps = [
        model(ids[:, i : i + 1], attention_mask=valid[:, i : i + 1], attention_cache=cache).logits
        for i in range(12)
    ]
    difference = (torch.cat(steps, dim=1) - whole.logits).abs()[valid.bool()]
    assert difference.max() < 1e-5


@torch.no_grad()
def test_bidirectional_attention_that_stayed_causal(make_model: MakeModel) -> None:
    """Changing the last token changes the first position's output; in causal mode it does not."""
    ids, images = some_ids(), some_images()
    changed = ids.clone()
    changed[:, -1] = 5 + (changed[:, -1] - 4) % 45
    for mode, is_both_ways in (("bidirectional", True), ("causal", False), ("prefix", False)):
        model = make_model(attention_mode=mode)
        moved = model(changed, images).logits[:, 0] != model(ids, images).logits[:, 0]
        assert bool(moved.any()) == is_both_ways, mode


@torch.no_grad()
@pytest.mark.parametrize("mode", ["prefix", "causal", "bidirectional"])
@pytest.mark.parametrize("with_images", [True, False])
def test_padding_that_leaked_into_pooling(
    make_model: MakeModel, mode: str, with_images: bool
) -> None:
    """Robot logits are those of the row alone, for left padding, right padding and both."""
    model, ids = make_model(attention_mode=mode), some_ids(batch=1)
    images = some_images(1) if with_images else None
    alone = model(ids, images, return_robot_selection=True, return_analysis_data=True)
    for left, right in ((4, 0), (0, 4), (3, 2)):
        valid = torch.tensor([[0] * left + [1] * 9 + [0] * right])
        for filler in (0, 17):
            padded = torch.full_like(valid, filler)
            padded[valid.bool()] = ids[0]
            output = model(
                padded, images, valid, return_robot_selection=True, return_analysis_data=True
            )
            torch.testing.assert_close(output.robot_logits, alone.robot_logits, **CLOSE)
            torch.testing.assert_close(output.pooled, alone.pooled, **CLOSE)
            torch.testing.assert_close(output.logits[valid.bool()], alone.logits[0], **CLOSE)
