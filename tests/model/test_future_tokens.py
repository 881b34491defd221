"""Future token heads against a plain loop over positions, and what they leave as it was."""

from __future__ import annotations

import pytest
import torch

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers
from bitgen.training.losses import caption_loss, count_future_targets, future_token_loss

from .small_model import small_config, small_model


def some_ids(rows: int = 3, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def norm(x_C: torch.Tensor, weight_C: torch.Tensor) -> torch.Tensor:
    return x_C / (x_C.square().mean() + 1e-5).sqrt() * weight_C


def state_by_hand(
    model: BitGenModel, state_C: torch.Tensor, index: int, token: int
) -> torch.Tensor:
    """One position, one head, from its weights by name: no module of the package is called."""
    weights = {
        name.removeprefix(f"future_heads.heads.{index}."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith(f"future_heads.heads.{index}.")
    }
    embedding_C = model.state_dict()["text_decoder.embed_tokens.weight"][token]
    known_C = norm(embedding_C, weights["embedding_norm.weight"])
    x_C = weights["merge_proj.weight"] @ torch.cat([state_C, known_C])
    inner_C = norm(x_C, weights["post_merge_layernorm.weight"])
    gate = torch.relu(weights["mlp.gate_proj.weight"] @ inner_C) ** 2
    gated = norm(
        gate * (weights["mlp.up_proj.weight"] @ inner_C), weights["mlp.ffn_sub_norm.weight"]
    )
    x_C = x_C + weights["mlp.down_proj.weight"] @ gated
    return norm(x_C, model.state_dict()["text_decoder.norm.weight"])


@torch.no_grad()
@pytest.mark.parametrize("with_images", [False, True])
def test_states_equal_a_loop_over_positions_and_heads(with_images: bool) -> None:
    model, ids = small_model(predict_tokens=4), some_ids()
    model.future_heads.heads[1].embedding_norm.weight.normal_(1.0, 0.3)
    images = torch.randn(3, 3, 32, 32) if with_images else None
    output = model(ids, images, return_future_tokens=True)
    assert output.future_states is not None and len(output.future_states) == 3
    torch.testing.assert_close(model.text_decoder.lm_head(output.states), output.logits)
    for row in range(3):
        for position in range(9 - 3):
            state_C = output.states[row, position]
            for index, states_BLC in enumerate(output.future_states):
                token = int(ids[row, position + index + 1])
                state_C = state_by_hand(model, state_C, index, token)
                torch.testing.assert_close(states_BLC[row, position], state_C, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["none", "ternary"])
def test_drafting_goes_the_same_way_as_training(quantization: str) -> None:
    model, ids = small_model(predict_tokens=3, quantization=quantization), some_ids()
    for _ in range(2):
        output = model(ids, return_future_tokens=True)
        assert output.future_states is not None
        state_BC = output.states[:, 4]
        for index, states_BLC in enumerate(output.future_states):
            state_BC = model.future_state(index, state_BC, ids[:, 5 + index])
            torch.testing.assert_close(state_BC, states_BLC[:, 4], atol=1e-5, rtol=1e-5)
        pack_ternary_layers(model)


@torch.no_grad()
def test_a_head_knows_the_tokens_before_its_own_and_none_later() -> None:
    model, ids = small_model(predict_tokens=4), some_ids(1)
    before = model(ids, return_future_tokens=True).future_states
    changed = ids.clone()
    changed[0, 5] = 5 + (changed[0, 5] - 4) % 45
    after = model(changed, return_future_tokens=True).future_states
    assert before is not None and after is not None
    for ahead, old, new in zip((2, 3, 4), before, after, strict=True):
        differs = (old - new).abs().amax(dim=-1)[0] > 1e-6
        first = 5 - ahead + 1  # the first position whose head is told token 5
        assert differs.tolist() == [position >= first for position in range(9)]


def test_shorter_rows_than_heads() -> None:
    model = small_model(predict_tokens=8)
    output = model(some_ids(2, 2), return_future_tokens=True)
    assert output.future_states is not None
    assert [tuple(states.shape) for states in output.future_states] == [(2, 2, 32)] * 7
    assert model(some_ids(2, 2)).future_states is None


def test_one_token_is_the_model_as_it_was_and_other_weights_start_the_same() -> None:
    torch.manual_seed(3)
    one = BitGenModel(small_config()).state_dict()
    torch.manual_seed(3)
    four = BitGenModel(small_config(predict_tokens=4)).state_dict()
    heads = {name for name in four if name.startswith("future_heads.")}
    assert not any(name.startswith("future_heads.") for name in one)
    assert len(heads) == 3 * 7 and set(four) - heads == set(one)
    assert all(torch.equal(four[name], tensor) for name, tensor in one.items())
    assert BitGenConfig.from_dict({"vocab_size": 50}).predict_tokens == 1


@torch.no_grad()
def test_without_its_heads_a_model_answers_the_same() -> None:
    model, ids = small_model(predict_tokens=3), some_ids()
    expected = model(ids).logits
    model.drop_future_heads()
    assert model.config == small_config()
    assert torch.equal(model(ids).logits, expected)
    assert not any(name.startswith("future_heads.") for name in model.state_dict())


@pytest.mark.parametrize("quantization", ["none", "ternary"])
def test_every_head_teaches_trunk_and_embedding(quantization: str) -> None:
    model = small_model(predict_tokens=4, quantization=quantization).train()
    ids = some_ids()
    images = torch.randn(3, 3, 32, 32)
    for ahead in (2, 3, 4):
        states = model(ids, images, return_future_tokens=True).future_states
        assert states is not None
        model.zero_grad()
        loss, _ = future_token_loss(states[ahead - 2], ids, ahead, model.text_decoder.lm_head)
        loss.backward()
        for name, parameter in model.named_parameters():
            used = not name.startswith("robot_selector.")
            if name.startswith("future_heads."):
                used = int(name.split(".")[2]) <= ahead - 2
            grad = parameter.grad
            assert (grad is not None and bool(grad.abs().sum() > 0)) == used, name


def test_heads_learn_what_follows_what_follows() -> None:
    """Rows that count on by their first number: the token three on is known from two in a row."""
    torch.manual_seed(0)
    model = BitGenModel(small_config(predict_tokens=3, quantization="ternary"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(150):
        first_B1 = torch.randint(0, 40, (16, 1))
        ids = 5 + (first_B1 + (1 + first_B1 % 3) * torch.arange(8)) % 40
        output = model(ids, return_future_tokens=True)
        loss_sum, count = caption_loss(output.logits, ids)
        losses = [loss_sum / count]
        assert output.future_states is not None
        for ahead, states in enumerate(output.future_states, start=2):
            loss_sum, count = future_token_loss(states, ids, ahead, model.text_decoder.lm_head)
            assert int(count) == count_future_targets(ids, ahead) == 16 * (8 - ahead)
            losses.append(loss_sum / count)
        if step == 0:
            expected = torch.tensor(50.0).log()
            assert all(abs(float(loss.detach()) / expected - 1) < 0.1 for loss in losses)
        optimizer.zero_grad()
        sum(losses, torch.zeros(())).backward()
        optimizer.step()
    assert all(float(loss.detach()) < 1.2 for loss in losses)


@pytest.mark.parametrize(
    "changes", [{"predict_tokens": 0}, {"predict_tokens": 9}, {"predict_tokens": True}]
)
def test_numbers_of_tokens_that_cannot_be(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="predict_tokens must be"):
        small_config(**changes)


def test_a_bidirectional_model_foretells_nothing() -> None:
    with pytest.raises(ConfigError, match="predict_tokens must be 1, got 2"):
        small_config(predict_tokens=2, attention_mode="bidirectional")
