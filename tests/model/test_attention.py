"""Both paths of attention: the fused kernel, and softmax written out."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from bitgen.model import attention
from bitgen.model.attention import masked_attention
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask, ScoresShape

MakeModel = Callable[..., BitGenModel]
DTYPES = {
    torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-6, torch.float64: 1e-12,
}  # fmt: skip
"""Largest difference between the paths for values about 1: half precisions round the scores."""

LENGTHS = torch.tensor([11, 4, 0])
BIAS = torch.randn(3, 1, 11, 11, generator=torch.Generator().manual_seed(9)).abs().neg()
MASKS = {
    "none": AttentionMask.bidirectional(),
    "causal": AttentionMask.causal(),
    "prefix": AttentionMask.prefix([3, 11, 0]),
    "window": AttentionMask.sliding_window(3, 2),
    "padding": AttentionMask.from_lengths(LENGTHS, 11),
    "left padding": AttentionMask.padding(torch.arange(11) >= 11 - LENGTHS[:, None]),
    "causal and padding": AttentionMask.causal() & AttentionMask.from_lengths(LENGTHS, 11),
    "additive": AttentionMask.custom(BIAS) & AttentionMask.from_lengths(LENGTHS, 11),
    "nothing": AttentionMask.custom(torch.zeros(11, 11, dtype=torch.bool)),
}


def random_qkv(dtype: torch.dtype, num_kv_heads: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    heads = (4, num_kv_heads, num_kv_heads)
    return tuple(
        torch.randn(3, h, 11, 8, generator=generator).to(dtype).requires_grad_() for h in heads
    )


def gradients(output: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return torch.autograd.grad((output.float() * weights).sum(), inputs)


@pytest.mark.parametrize("kernel_zeroes_dead_rows", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MASKS)
def test_the_fused_path_equals_the_one_that_returns_weights(
    name: str,
    dtype: torch.dtype,
    num_kv_heads: int,
    kernel_zeroes_dead_rows: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Outputs and gradients; rows without keys are exact zeros in both."""
    if not kernel_zeroes_dead_rows:
        monkeypatch.setattr(attention, "_kernel_zeroes_dead_rows", lambda *_: False)
    monkeypatch.setattr(attention, "_is_faster_written_out", lambda *_: False)
    mask, qkv = MASKS[name], random_qkv(dtype, num_kv_heads)
    fused, none = masked_attention(*qkv, mask)
    written, weights = masked_attention(*qkv, mask, return_weights=True)
    assert none is None and weights is not None
    assert fused.dtype == written.dtype == dtype
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(fused, written, atol=tolerance, rtol=tolerance)
    allowed = mask.to_bool(11, 11).expand(3, 4, -1, -1)
    alive = allowed.any(dim=-1)
    for output in (fused, written):
        assert (output[~alive] == 0).all()
    assert (weights[~allowed] == 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), alive.to(weights.dtype))
    for ours, reference in zip(gradients(fused, qkv), gradients(written, qkv), strict=True):
        assert ours.isfinite().all() and reference.isfinite().all()
        torch.testing.assert_close(ours, reference, atol=8 * tolerance, rtol=8 * tolerance)


@pytest.mark.parametrize("name", MASKS)
def test_the_path_chosen_for_training_in_bfloat16_equals_the_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = random_qkv(torch.bfloat16)
    scores = ((*qkv[0].shape[:3], qkv[1].shape[2]), torch.bfloat16, qkv[0].device)
    assert attention._is_faster_written_out(*scores)
    chosen, _ = masked_attention(*qkv, MASKS[name])
    with torch.no_grad():
        assert not attention._is_faster_written_out(*scores)
        fused, _ = masked_attention(*qkv, MASKS[name])
    torch.testing.assert_close(chosen, fused, atol=3e-2, rtol=3e-2)


def test_softmax_is_written_out_only_where_that_is_faster_and_fits() -> None:
    def is_written_out(shape: ScoresShape, dtype: torch.dtype = torch.bfloat16) -> bool:
        return attention._is_faster_written_out(shape, dtype, torch.device("cpu"))

    assert is_written_out((8, 8, 256, 256))
    assert not is_written_out((8, 8, 1024, 1024))
    assert not is_written_out((2048, 8, 256, 256))  # 2 GiB of weights a layer
    assert not is_written_out((8, 8, 256, 256), torch.float32)
    with torch.no_grad():
        assert not is_written_out((8, 8, 256, 256))


def test_no_mask_and_causal_are_the_bare_kernel_call() -> None:
    q, k, v = (tensor.detach() for tensor in random_qkv(torch.float32))
    for mask, is_causal in ((AttentionMask.bidirectional(), False), (AttentionMask.causal(), True)):
        bare = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        assert torch.equal(masked_attention(q, k, v, mask)[0], bare)


def test_a_kernel_is_trusted_to_zero_rows_without_keys_only_where_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    zeroes = attention._kernel_zeroes_dead_rows.__wrapped__
    q, k, v = random_qkv(torch.float32)
    nothing = torch.zeros(11, 11, dtype=torch.bool)
    bare = F.scaled_dot_product_attention(q, k, v, attn_mask=nothing)
    assert zeroes("cpu", torch.float32) == bool((bare == 0).all())
    assert not zeroes("cuda", torch.float32)  # its kernels are many
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: q + v.mean())
        assert not zeroes("cpu", torch.float32)
    monkeypatch.setitem(sys.modules, "torch.nn.attention", None)  # as in torch 2.2
    assert not zeroes("cpu", torch.float32)


def test_a_mask_of_another_batch_or_head_count_is_refused_with_both_shapes() -> None:
    q, k, v = random_qkv(torch.float32)
    two_rows = AttentionMask.padding(torch.tensor([[1] * 10 + [0]] * 2))
    with pytest.raises(ValueError, match=r"\(2, 11\).*\[3, 4, 11, 11\]"):
        masked_attention(q, k, v, two_rows)
    two_heads = AttentionMask.custom(torch.ones(3, 2, 11, 11, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"\(3, 2, 11, 11\); expected \[3, 4, 11, 11\]"):
        masked_attention(q, k, v, two_heads)


@torch.no_grad()
def test_a_mask_kept_from_prediction_serves_training() -> None:
    mask = AttentionMask.causal() & AttentionMask.from_lengths(LENGTHS, 11)
    with torch.inference_mode():
        masked_attention(*random_qkv(torch.float32), mask)
        masked_attention(*random_qkv(torch.float32), mask, return_weights=True)
    with torch.enable_grad():
        qkv = random_qkv(torch.float32)
        for return_weights in (False, True):
            output, _ = masked_attention(*qkv, mask, return_weights)
            assert all(gradient.isfinite().all() for gradient in gradients(output, qkv))


@torch.no_grad()
def test_every_layer_of_the_image_encoder_shows_its_weights_and_takes_a_mask(
    make_model: MakeModel,
) -> None:
    model = make_model(encoder_layers=2)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[5, 6, 7]] * 2)
    output = model(ids, images, return_analysis_data=True)
    patches = model.num_image_tokens
    assert [layer.shape for layer in output.image_attentions] == [(2, 4, patches, patches)] * 2
    for layer in output.image_attentions:
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(2, 4, patches))
    torch.testing.assert_close(output.logits, model(ids, images).logits, atol=1e-5, rtol=1e-5)
    assert model(ids, images).image_attentions is None
    # A row without a picture has no weights, the other keeps its own.
    mask = model.build_attention_mask(torch.ones(2, 3), image_mask_B=torch.tensor([False, True]))
    without = model(ids, images, mask, return_analysis_data=True).image_attentions
    for layer, whole in zip(without, output.image_attentions, strict=True):
        assert (layer[0] == 0).all()
        torch.testing.assert_close(layer[1], whole[1])
    nobody = model.build_attention_mask(torch.ones(2, 3), image_mask_B=torch.tensor([False] * 2))
    assert model(ids, images, nobody, return_analysis_data=True).image_attentions == ()
    # Patches 2 and 3 as padding: what stands there changes no other feature.
    valid = torch.tensor([[1, 1, 0, 0]] * 2)
    mask = AttentionMask.padding(valid)
    features, weights = model.image_encoder(images, mask, return_weights=True)
    assert all((layer[..., 2:] == 0).all() and (layer[:, :, 2:] == 0).all() for layer in weights)
    unmasked, _ = model.image_encoder(images)
    assert not torch.allclose(features[:, :2], unmasked[:, :2], atol=1e-4)


def test_torchvision_backbones_take_no_mask(make_model: MakeModel) -> None:
    model = make_model(image_encoder="squeezenet1_1", image_size=64)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert model(torch.tensor([[5]]), images, return_analysis_data=True).image_attentions == ()
    with pytest.raises(ValueError, match="SqueezeNet takes no attention mask"):
        model.image_encoder(images, AttentionMask.causal())


def test_a_forward_on_an_accelerator_waits_for_no_mask(make_model: MakeModel) -> None:
    """On the meta device, where reading a value raises, with masks built on the CPU."""
    model = make_model().to("meta")
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    images = torch.zeros(2, 3, 32, 32, device="meta")
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for present in (None, torch.tensor([True, False])):
        mask = model.build_attention_mask(valid, torch.tensor([1, 2]), present)
        output = model(ids, images, mask, return_analysis_data=True)
        assert output.logits.device.type == "meta"
        assert output.pooled.shape == (2, 32)
