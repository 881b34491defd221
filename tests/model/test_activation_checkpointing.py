"""Recomputing layers in the backward pass: less is kept, and no number changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bitgen.model.attention import _kernel_zeroes_dead_rows
from bitgen.model.bitgen import BitGenModel, BitGenOutput
from bitgen.model.layers import TransformerLayer

from .small_model import small_model

MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "dropout": {"dropout": 0.3},
    "ternary": {"quantization": "ternary", "dropout": 0.1},
    "experts": {"quantization": "ternary", "num_experts": 4, "experts_per_token": 2},
    "torchvision": {"image_encoder": "mobilenet_v3_small", "dropout": 0.3},
}


def some_inputs(model: BitGenModel) -> tuple[torch.Tensor, torch.Tensor, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (3, 9), generator=generator)
    valid = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])
    images = torch.randn(3, 3, 32, 32, generator=generator)
    return ids, images, model.build_attention_mask(valid, torch.tensor([2, 0, 1]))


def run(model: BitGenModel, **options: Any) -> BitGenOutput:
    ids, images, mask = some_inputs(model)
    options.setdefault("return_robot_selection", True)
    return model(ids, images, mask, **options)


def loss_of(output: BitGenOutput) -> torch.Tensor:
    loss = output.logits.float().square().mean() + output.robot_logits.square().mean()
    for routing in output.routings or ():
        loss = loss + routing.z_sum + routing.probability_sums_E.square().sum()
    return loss


def train_twice(model: BitGenModel, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Losses, gradients, batch statistics and random state after two backward passes."""
    torch.manual_seed(3)
    model.train()
    numbers = []
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_of(run(model))
        loss.backward()
        numbers.append(loss.detach())
    numbers += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*numbers, *model.buffers(), torch.get_rng_state()]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_same_bits(kind: str, dtype: torch.dtype | None) -> None:
    plain, recomputed = small_model(**MODELS[kind]), small_model(**MODELS[kind])
    recomputed.set_activation_checkpointing(True)
    expected, numbers = train_twice(plain, dtype), train_twice(recomputed, dtype)
    assert len(numbers) == len(expected) > 20
    assert all(torch.equal(*pair) for pair in zip(numbers, expected, strict=True))


def test_the_first_backward_pass_of_a_process_is_right_too() -> None:
    """Attention tries its kernel at the first call, with gradients of its own."""
    plain, recomputed = small_model(), small_model()
    recomputed.set_activation_checkpointing(True)
    _kernel_zeroes_dead_rows.cache_clear()
    numbers = train_twice(recomputed, None)
    assert all(torch.equal(*p) for p in zip(numbers, train_twice(plain, None), strict=True))


def kept_bytes(model: BitGenModel) -> int:
    """What autograd holds between forward and backward beside the weights, each tensor once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run(model, return_robot_selection=False)
    assert output.logits.requires_grad
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("kind", ["dense", "ternary", "experts"])
def test_less_is_kept_for_the_backward_pass(kind: str) -> None:
    """Of four layers instead of one, only three more inputs."""
    bytes_of: dict[tuple[int, bool], int] = {}
    for num_layers in (1, 4):
        model = small_model(**MODELS[kind], num_layers=num_layers).train()
        for enabled in (False, True):
            model.set_activation_checkpointing(enabled)
            bytes_of[num_layers, enabled] = kept_bytes(model)
    positions = 3 * (model.num_image_tokens + 9)
    more = bytes_of[4, True] - bytes_of[1, True]
    assert more == 3 * positions * 32 * 4
    assert bytes_of[4, False] - bytes_of[1, False] > 5 * more


def runs_of_layers(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Filled at each run of a layer by whether gradients are recorded."""
    runs: list[bool] = []
    original = TransformerLayer._run

    def counted(self: TransformerLayer, *inputs: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return original(self, *inputs)

    monkeypatch.setattr(TransformerLayer, "_run", counted)
    return runs


def test_layers_are_recomputed_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    layers = 2 + 1  # decoder and encoder
    runs = runs_of_layers(monkeypatch)

    def count(return_loss: Callable[[], torch.Tensor]) -> int:
        runs.clear()
        return_loss().backward()
        return len(runs)

    def whole() -> torch.Tensor:
        return run(model, return_robot_selection=False).logits.sum()

    def cached() -> torch.Tensor:
        ids, _, _ = some_inputs(model)
        return model(ids, attention_cache=model.new_cache(3, 9)).logits.sum()

    model.train()
    assert count(whole) == layers
    model.set_activation_checkpointing(True)
    assert count(whole) == 2 * layers
    assert count(cached) == 2
    model.eval()
    assert count(whole) == layers
    model.train()
    runs.clear()
    with torch.no_grad():
        run(model, return_robot_selection=False)
    assert len(runs) == layers
    model.set_activation_checkpointing(False)
    assert count(whole) == layers


def test_a_frozen_encoder_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(freeze_encoder=True).train()
    model.set_activation_checkpointing(True)
    runs = runs_of_layers(monkeypatch)
    run(model, return_robot_selection=False).logits.sum().backward()
    assert len(runs) == 2 * 2 + 1


def test_attention_weights_are_returned_as_well() -> None:
    plain, recomputed = small_model().train(), small_model().train()
    recomputed.set_activation_checkpointing(True)
    outputs = [run(model, return_analysis_data=True) for model in (plain, recomputed)]
    for ours, theirs in zip(outputs[0].attentions, outputs[1].attentions, strict=True):
        assert torch.equal(ours, theirs)
    for output in outputs:
        sum(weights.square().sum() for weights in output.attentions).backward()
    pairs = zip(plain.named_parameters(), recomputed.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        if ours.grad is not None:
            assert torch.equal(ours.grad, theirs.grad), name
