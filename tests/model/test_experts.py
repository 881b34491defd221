"""Mixture of experts against a loop over tokens and experts, and in every mode of the model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitgen.errors import ConfigError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.experts import (
    MixtureOfExperts,
    mixture_of_experts_reference,
    routing_weights,
)
from bitgen.model.layers import FeedForward
from bitgen.model.masks import AttentionMask
from bitgen.model.ternary import PackedTernaryLinear, pack_ternary_layers

from .small_model import small_config, small_model

WIDTH = 16
SOME_EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2}


def some_mixture(
    num_experts: int, experts_per_token: int, quantization: str = "none", seed: int = 0
) -> MixtureOfExperts:
    """With a router that is sure of its choices."""
    torch.manual_seed(seed)
    experts = [FeedForward(WIDTH, 24, quantization, eps=1e-5) for _ in range(num_experts)]
    mixture = MixtureOfExperts(experts, WIDTH, experts_per_token)
    with torch.no_grad():
        mixture.router.weight.normal_()
    return mixture


def some_input(seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


# Against the reference --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize(
    ("num_experts", "experts_per_token"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2)]
)
def test_output_and_gradients_equal_a_loop_over_tokens_and_experts(
    num_experts: int, experts_per_token: int, padding: str, seed: int
) -> None:
    ours = some_mixture(num_experts, experts_per_token, seed=seed)
    theirs = copy.deepcopy(ours)
    x_BSC, gradient_BSC = some_input(seed), some_input(seed + 100)
    valid_N = torch.ones(15, dtype=torch.bool)
    if padding != "none":
        valid_N = torch.rand(15, generator=torch.Generator().manual_seed(seed)) < 0.6
        valid_N &= padding == "some"
    tokens_T = None if padding == "none" else valid_N.nonzero().squeeze(1)

    our_x = x_BSC.clone().requires_grad_()
    our_y, routing = ours(our_x, tokens_T)
    our_y.backward(gradient_BSC)

    their_x = x_BSC.clone().requires_grad_()
    their_y = torch.zeros(15, WIDTH)
    if valid_N.any():
        rows = mixture_of_experts_reference(
            their_x.view(15, WIDTH)[valid_N],
            theirs.router.weight,
            theirs.experts,
            experts_per_token,
        )
        their_y = their_y.index_put((valid_N,), rows)
        their_y.backward(gradient_BSC.view(15, WIDTH))
    assert torch.equal(
        our_y.view(15, WIDTH)[~valid_N], torch.zeros_like(our_y.view(15, WIDTH)[~valid_N])
    )
    torch.testing.assert_close(our_y.view(15, WIDTH), their_y, atol=1e-6, rtol=1e-5)
    their_gradient = torch.zeros_like(x_BSC) if their_x.grad is None else their_x.grad
    torch.testing.assert_close(our_x.grad, their_gradient, atol=1e-6, rtol=1e-5)
    their_gradients = gradients_of(theirs)
    for name, gradient in gradients_of(ours).items():
        torch.testing.assert_close(gradient, their_gradients[name], atol=1e-6, rtol=1e-5, msg=name)
    assert routing.num_tokens == int(valid_N.sum())
    assert int(routing.chosen_E.sum()) == experts_per_token * routing.num_tokens


def test_what_is_recorded_is_what_numpy_counts() -> None:
    mixture, x_BSC = some_mixture(4, 2), some_input()
    tokens_T = torch.tensor([0, 2, 3, 8, 14])
    _, routing = mixture(x_BSC, tokens_T)
    x_TC = x_BSC.view(15, WIDTH)[tokens_T].double().numpy()
    logits_TE = x_TC @ mixture.router.weight.detach().double().numpy().T
    exponentials_TE = np.exp(logits_TE)
    sums_T = exponentials_TE.sum(axis=1)
    chosen_E = np.bincount(np.argsort(-logits_TE, axis=1)[:, :2].ravel(), minlength=4)
    assert routing.chosen_E.tolist() == chosen_E.tolist()
    shares_E = (exponentials_TE / sums_T[:, None]).sum(axis=0)
    np.testing.assert_allclose(routing.probability_sums_E.detach(), shares_E, rtol=1e-5)
    assert routing.z_sum.item() == pytest.approx((np.log(sums_T) ** 2).sum(), rel=1e-5)
    assert (routing.num_tokens, routing.experts_per_token) == (5, 2)


def test_weights_are_shared_by_two_and_a_probability_for_one() -> None:
    logits_TE = torch.tensor([[0.0, 3.0, 1.0]], dtype=torch.float64).log1p()
    weights_TK, experts_TK, probabilities_TE = routing_weights(logits_TE, 2)
    assert experts_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(weights_TK, torch.tensor([[4 / 6, 2 / 6]], dtype=torch.float64))
    torch.testing.assert_close(
        probabilities_TE, torch.tensor([[1 / 7, 4 / 7, 2 / 7]], dtype=torch.float64)
    )
    alone_TK, experts_TK, _ = routing_weights(logits_TE, 1)
    assert experts_TK.tolist() == [[1]]
    torch.testing.assert_close(alone_TK, torch.tensor([[4 / 7]], dtype=torch.float64))


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_gradients_equal_finite_differences(experts_per_token: int) -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    mixture = MixtureOfExperts(experts, WIDTH, experts_per_token).double()
    x_BSC = some_input(dtype=torch.float64)[:, :2].requires_grad_()
    tokens_T = torch.tensor([0, 1, 3, 5])

    def answer(x_BSC: torch.Tensor, router_weight_EC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y_BSC, routing = torch.func.functional_call(
            mixture, {"router.weight": router_weight_EC}, (x_BSC, tokens_T)
        )
        return y_BSC, routing.probability_sums_E, routing.z_sum

    router_weight_EC = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(answer, (x_BSC, router_weight_EC))


# Experts without tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "ternary"])
def test_an_expert_without_tokens_has_a_zero_gradient_in_training(quantization: str) -> None:
    mixture = some_mixture(4, 1, quantization)
    with torch.no_grad():
        mixture.router.weight[2:] = 0.0
        mixture.router.weight[0, 0], mixture.router.weight[1, 0] = 50.0, -50.0
    x_BSC = some_input()
    x_BSC[..., 0] = x_BSC[..., 0].sign() + x_BSC[..., 0]
    y_BSC, routing = mixture(x_BSC)
    assert routing.chosen_E[2:].tolist() == [0, 0] and bool((routing.chosen_E[:2] > 0).all())
    y_BSC.square().sum().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        is_idle = name.startswith(("experts.2.", "experts.3."))
        assert bool(parameter.grad.any()) != is_idle, name


def test_an_expert_without_tokens_costs_nothing_when_nothing_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mixture, called = some_mixture(4, 1), []
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[3, 0] = 50.0
    for index, expert in enumerate(mixture.experts):
        expert.register_forward_hook(lambda *_, index=index: called.append(index))
    x_BSC = some_input()
    x_BSC[..., 0] = 1.0
    with torch.no_grad():
        mixture(x_BSC)
        assert called == [3]
        nothing, routing = mixture(x_BSC, torch.zeros(0, dtype=torch.int64))
    assert called == [3]
    assert torch.equal(nothing, torch.zeros_like(x_BSC))
    assert routing.num_tokens == 0 and not routing.chosen_E.any()


# Precision and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "ternary"])
def test_autocast_computes_experts_in_bfloat16_and_the_router_in_float32(
    quantization: str,
) -> None:
    mixture, x_BSC = some_mixture(4, 2, quantization), some_input().requires_grad_()
    exact_BSC, exact = mixture(x_BSC)
    with torch.autocast("cpu", torch.bfloat16):
        y_BSC, routing = mixture(x_BSC)
    assert y_BSC.dtype == torch.bfloat16
    assert torch.equal(routing.chosen_E, exact.chosen_E)
    assert torch.equal(routing.probability_sums_E, exact.probability_sums_E)
    assert (y_BSC - exact_BSC).abs().max() < 0.05 * exact_BSC.abs().max()
    y_BSC.float().square().sum().backward()
    assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(mixture).values())


def test_float64_is_kept() -> None:
    mixture, x_BSC = some_mixture(4, 2), some_input()
    expected, _ = mixture(x_BSC)
    y_BSC, routing = mixture.double()(x_BSC.double())
    assert (y_BSC.dtype, routing.z_sum.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(y_BSC.float(), expected, atol=1e-6, rtol=1e-5)
    y_BSC.sum().backward()
    assert all(gradient.dtype == torch.float64 for gradient in gradients_of(mixture).values())


def test_shapes_are_known_without_data() -> None:
    with torch.device("meta"):
        model = BitGenModel(small_config(num_experts=4, experts_per_token=2)).eval()
        ids, images = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 3, 32, 32)
    output = model(ids, images, torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
    assert output.logits.shape == (2, 7, 50) and output.logits.device.type == "meta"
    output.logits.sum().backward()


# In the model -----------------------------------------------------------------------------------


def test_names_of_parameters_and_which_layers_have_experts() -> None:
    names = {name for name, _ in small_model(**SOME_EXPERTS).named_parameters()}
    layer = "text_decoder.layers.1.mlp"
    assert f"{layer}.router.weight" in names
    for projection in ("gate_proj", "up_proj", "ffn_sub_norm", "down_proj"):
        assert f"{layer}.experts.3.{projection}.weight" in names
    assert not any("experts" in name for name in names if name.startswith("image_encoder"))
    dense = {name for name, _ in small_model().named_parameters()}
    assert f"{layer}.gate_proj.weight" in dense and not any("expert" in name for name in dense)


def test_equal_experts_are_one_dense_layer() -> None:
    """Two of two with the same weights: shares add up to 1, whatever the router says."""
    dense, mixture = small_model(), small_model(num_experts=2, experts_per_token=2)
    state = {}
    for name, tensor in mixture.state_dict().items():
        plain = name.replace(".experts.0.", ".").replace(".experts.1.", ".")
        state[name] = tensor if "router" in name else dense.state_dict()[plain]
    mixture.load_state_dict(state)
    ids = torch.randint(5, 50, (3, 7), generator=torch.Generator().manual_seed(1))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        mixture(ids, images).logits, dense(ids, images).logits, atol=1e-5, rtol=1e-5
    )


def test_routings_are_returned_in_training_and_as_analysis_data() -> None:
    model, ids = small_model(**SOME_EXPERTS), torch.full((2, 5), 7)
    assert model(ids).routings is None
    analysed = model(ids, return_analysis_data=True).routings
    assert [routing.num_tokens for routing in analysed] == [10, 10]
    trained = model.train()(ids, return_robot_selection=True).routings
    assert [routing.num_tokens for routing in trained] == [10, 10]  # robots' texts do not count
    assert trained[0].z_sum.requires_grad
    assert small_model().train()(ids, return_analysis_data=True).routings is None


def tokens_routed(model: BitGenModel, *inputs: Any, **options: Any) -> int:
    output = model(*inputs, return_analysis_data=True, **options)
    counts = {routing.num_tokens for routing in output.routings}
    assert len(counts) == 1
    return counts.pop()


@torch.no_grad()
def test_only_tokens_are_routed() -> None:
    model = small_model(**SOME_EXPERTS)
    ids, images = torch.full((3, 7), 7), torch.zeros(3, 3, 32, 32)
    valid = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    pictures = model.num_image_tokens
    assert tokens_routed(model, ids) == 21
    assert tokens_routed(model, ids, images) == 21 + 3 * pictures
    assert tokens_routed(model, ids, images, valid) == 16 + 3 * pictures
    mask = model.build_attention_mask(valid, image_mask_B=torch.tensor([True, False, True]))
    assert tokens_routed(model, ids, images, mask) == 16 + 2 * pictures
    one_row_for_all = AttentionMask.padding(torch.tensor([[0] + [1] * 6])) & AttentionMask.causal()
    assert tokens_routed(model, ids, None, one_row_for_all) == 18


@torch.no_grad()
@pytest.mark.parametrize("kind", ["static", "window"])
def test_only_new_tokens_are_routed_in_cached_steps(kind: str) -> None:
    model, ids = small_model(**SOME_EXPERTS), torch.full((2, 7), 7)
    if kind == "static":
        cache: Any = model.new_cache(2, 7)
    else:
        cache = model.new_sliding_window_cache(2, window=4, sinks=1)
    valid = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1]])
    causal = AttentionMask.causal()
    first = AttentionMask.padding(valid[:, :3]) & causal
    assert tokens_routed(model, ids[:, :3], None, first, attention_cache=cache) == 4
    new_alone = AttentionMask.padding(valid[:, 3:6]) & causal
    assert tokens_routed(model, ids[:, 3:6], None, new_alone, attention_cache=cache) == 5
    all_so_far = AttentionMask.padding(valid) & causal
    assert tokens_routed(model, ids[:, 6:], None, all_so_far, attention_cache=cache) == 2


@torch.no_grad()
def test_padding_of_robots_texts_is_not_routed() -> None:
    """Else what a robot's text is would depend on the longest text of the catalog."""
    model = small_model(**SOME_EXPERTS)
    tokens: list[int] = []
    layer = model.text_decoder.layers[0].mlp
    layer.register_forward_hook(lambda _, __, output: tokens.append(output[1].num_tokens))
    model.encode_robots()
    assert tokens == [4 + 2 + 3]


@pytest.mark.parametrize(("num_experts", "experts_per_token"), [(2, 1), (4, 2)])
def test_every_weight_of_a_mixture_gets_a_gradient(
    num_experts: int, experts_per_token: int
) -> None:
    model = small_model(
        quantization="ternary", num_experts=num_experts, experts_per_token=experts_per_token
    ).train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (8, 9), generator=generator)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    output = model(ids, images, return_robot_selection=True)
    assert all(bool((routing.chosen_E > 0).all()) for routing in output.routings)
    (output.logits.square().mean() + output.robot_logits.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_experts_are_packed_and_the_router_stays_as_it_is() -> None:
    model = small_model(quantization="ternary", **SOME_EXPERTS)
    pack_ternary_layers(model)
    mixture = model.text_decoder.layers[0].mlp
    assert isinstance(mixture.router, nn.Linear) and mixture.router.weight.dtype == torch.float32
    layers = [m for m in mixture.experts.modules() if isinstance(m, PackedTernaryLinear)]
    assert len(layers) == 4 * 3


def test_a_mixture_has_no_text_tower_of_transformers() -> None:
    tower = small_model().text_tower_state_dict()
    mixture = small_model(**SOME_EXPERTS)
    with pytest.raises(ConfigError, match="4 experts") as error:
        mixture.text_tower_state_dict()
    assert "num_experts 1" in str(error.value.remedy)
    with pytest.raises(ConfigError, match="4 experts"):
        mixture.load_text_tower(tower)
