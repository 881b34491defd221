from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.errors import ModelFileError
from bitgen.model.bitgen import BitGenModel
from bitgen.training.optimizer import (
    decayed_parameters,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rates,
)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.stem = nn.Conv2d(3, 4, 2)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.position_embedding = nn.Parameter(torch.randn(1, 7, 4))


def take_a_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_only_matrices_and_convolutions_decay() -> None:
    assert set(decayed_parameters(Parts())) == {"stem.weight", "linear.weight"}


def test_each_trainable_parameter_is_in_one_group_with_its_decay() -> None:
    model = Parts()
    optimizer = make_optimizer(model, 1e-3, 0.1)
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay)
    for name, parameter in model.named_parameters():
        if name.startswith("frozen"):
            assert id(parameter) not in decay
        else:
            expected = 0.1 if name in ("stem.weight", "linear.weight") else 0.0
            assert decay[id(parameter)] == expected, name


def test_of_the_whole_model_norms_biases_and_embeddings_do_not_decay(
    make_config: Callable[..., BitGenConfig],
) -> None:
    model = BitGenModel(make_config())
    decayed = decayed_parameters(model)
    assert "text_decoder.embed_tokens.weight" not in decayed
    assert all(parameter.ndim >= 2 for parameter in decayed.values())
    linear = [name for name in dict(model.named_parameters()) if name.endswith("proj.weight")]
    assert linear and set(linear) <= set(decayed)


def test_experts_decay_and_their_router_does_not() -> None:
    config = BitGenConfig.preset("nano", num_layers=1, num_experts=2, experts_per_token=2)
    decayed = set(decayed_parameters(BitGenModel(config)))
    assert "text_decoder.layers.0.mlp.experts.1.down_proj.weight" in decayed
    assert "text_decoder.layers.0.mlp.router.weight" not in decayed


def test_without_a_fused_kernel_plain_adamw_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.2 does it on a CPU: it refuses after it has written `fused` into the groups."""
    original = torch.optim.AdamW.__init__

    def init(self, params, fused=None, **settings):  # type: ignore[no-untyped-def]
        original(self, params, fused=fused, **settings)
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on supported devices")

    monkeypatch.setattr(torch.optim.AdamW, "__init__", init)
    model = Parts()
    before = model.linear.weight.clone()
    optimizer = make_optimizer(model, 1e-2, 0.1)
    assert not any(group["fused"] for group in optimizer.param_groups)
    take_a_step(model, optimizer)
    assert not torch.equal(model.linear.weight, before)


def test_a_reloaded_optimizer_takes_the_same_next_step() -> None:
    torch.manual_seed(0)
    model = Parts()
    optimizer = make_optimizer(model, 1e-2, 0.1)
    take_a_step(model, optimizer)
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer, model).items()}
    assert "optimizer.linear.weight:exp_avg" in tensors
    twin = Parts()
    twin.load_state_dict(model.state_dict())
    restored = make_optimizer(twin, 1e-2, 0.1)
    load_optimizer_tensors(restored, twin, {**tensors, "random.cpu": torch.zeros(2)})
    for source, target in ((model, optimizer), (twin, restored)):
        torch.manual_seed(1)
        take_a_step(source, target)
    for (name, expected), got in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(expected, got), name


def test_state_of_another_model_is_refused() -> None:
    model = Parts()
    optimizer = make_optimizer(model, 1e-2, 0.1)
    with pytest.raises(ModelFileError, match="other.weight"):
        load_optimizer_tensors(
            optimizer, model, {"optimizer.other.weight:exp_avg": torch.zeros(4, 4)}
        )
    with pytest.raises(ModelFileError, match=r"\[3, 3\].*\[4, 4\]"):
        load_optimizer_tensors(
            optimizer, model, {"optimizer.linear.weight:exp_avg": torch.zeros(3, 3)}
        )


# A learning rate of the image encoder's own ------------------------------------------------------


def rates_by_part(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, set[float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            part = names[id(parameter)].partition(".")[0]
            rates.setdefault(part, set()).add(group["lr"])
    return rates


def test_the_image_encoder_has_its_own_rate_through_the_whole_schedule(
    make_config: Callable[..., BitGenConfig],
) -> None:
    model = BitGenModel(make_config())
    optimizer = make_optimizer(model, 1e-2, 0.1, encoder_learning_rate=1e-4)
    for rate in (1e-2, 4e-3, 0.0):
        set_rates(optimizer, rate, 0.05)
        found = rates_by_part(optimizer, model)
        (of_encoder,) = found.pop("image_encoder")
        assert of_encoder == pytest.approx(rate / 100)
        assert set().union(*found.values()) == {rate}
    decays = decayed_parameters(model)
    for group in optimizer.param_groups:
        expected = {
            id(parameter) in {id(p) for p in decays.values()} for parameter in group["params"]
        }
        assert expected == {group["weight_decay"] == 0.05}
    numbered = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(numbered)) == len(numbered) == len(list(model.parameters()))


def test_without_its_own_rate_the_groups_are_those_of_all(
    make_config: Callable[..., BitGenConfig],
) -> None:
    model = BitGenModel(make_config())
    for own in (None, 1e-2):
        groups = make_optimizer(model, 1e-2, 0.1, own).param_groups
        assert [group["decays"] for group in groups] == [True, False]


def test_state_goes_over_to_a_rate_of_its_own(make_config: Callable[..., BitGenConfig]) -> None:
    model = BitGenModel(make_config())
    alike = make_optimizer(model, 1e-2, 0.1)
    take_a_step(model, alike)
    tensors = optimizer_tensors(alike, model)
    apart = make_optimizer(model, 1e-2, 0.1, encoder_learning_rate=1e-3)
    load_optimizer_tensors(apart, model, tensors)
    again = optimizer_tensors(apart, model)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)
    assert set().union(*rates_by_part(apart, model).values()) == {1e-2, 1e-3}
