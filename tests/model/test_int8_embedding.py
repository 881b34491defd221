"""The embedding and lm head in int8, against their float forms and a plain reference."""

from __future__ import annotations

import pytest
import torch

from bitgen.kernels.quantize import quantize_activation, quantize_rows
from bitgen.model.int8_embedding import Int8Embedding

from .small_model import small_model


def make_embedding(rows: int, width: int) -> torch.nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(rows, width)


@pytest.mark.parametrize(("rows", "width"), [(64, 32), (50, 30)])
def test_rows_and_logits_are_what_their_definition_says(rows: int, width: int) -> None:
    embedding = make_embedding(rows, width)
    module = Int8Embedding.from_trained(embedding)
    quantized_VC, scale_V = quantize_rows(embedding.weight.detach())
    assert torch.equal(module.quantized(), quantized_VC)
    ids = torch.tensor([[3, rows - 1], [0, 3]])
    assert torch.equal(module(ids), quantized_VC[ids].float() * scale_V[ids][..., None])
    hidden = torch.randn(2, 3, width)
    x, token_scale = quantize_activation(hidden)
    sums = (x.double() @ quantized_VC.double().T).float()
    assert torch.equal(module.logits(hidden), sums * (scale_V / token_scale))
    assert torch.equal(module.logits(hidden, 7), module.logits(hidden)[..., :7])
    assert module.logits(hidden[:, :0]).shape == (2, 0, rows)


def test_it_stays_close_to_float() -> None:
    embedding = make_embedding(64, 256)
    module = Int8Embedding.from_trained(embedding)
    with torch.no_grad():
        ids, hidden = torch.arange(64), torch.randn(5, 256)
        step = module.row_scales[:, None]
        assert ((module(ids) - embedding(ids)).abs() <= step / 2 * 1.0001).all()
        exact = hidden @ embedding.weight.T
        torch.testing.assert_close(module.logits(hidden), exact, atol=0.6, rtol=0)


def test_weights_that_are_loaded_take_the_place_of_those_in_use() -> None:
    module, other = (Int8Embedding.from_trained(make_embedding(40, 16)) for _ in range(2))
    with torch.no_grad():
        other.tiles.neg_()
    ids = torch.arange(40)
    before = module(ids)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module(ids), -before)
    assert repr(module) == "Int8Embedding(40, 16)"


def test_a_model_runs_on_it_with_and_without_a_cache() -> None:
    model = small_model(quantization="ternary", predict_tokens=3)
    ids_BL = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        exact = model(ids_BL, images).logits
        model.text_decoder.quantize_embedding()
        embedding = model.text_decoder.embed_tokens
        model.text_decoder.quantize_embedding()  # once is enough
        assert model.text_decoder.embed_tokens is embedding
        whole = model(ids_BL, images, return_image_words=True, return_future_tokens=True)
        assert whole.image_words is not None and whole.future_states is not None
        cache = model.new_cache(2, 64)
        first = model(ids_BL[:, :3], images, attention_cache=cache).logits
        last = model(ids_BL[:, 3:], attention_cache=cache).logits
    correlation = torch.corrcoef(torch.stack([exact.flatten(), whole.logits.flatten()]))[0, 1]
    assert correlation > 0.99
    cached = torch.cat([first, last], dim=1)
    torch.testing.assert_close(cached[:, -1], whole.logits[:, -1], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("quantization", ["ternary", "none"])
def test_it_is_no_float_text_tower(quantization: str) -> None:
    model = small_model(quantization=quantization)
    model.text_decoder.quantize_embedding()
    with pytest.raises(ValueError, match="no float weights"):
        model.text_tower_state_dict()
