"""Attention, masks, caches and decoder against the float64 decoder of `numpy_reference`.

Ours computes in float32, so differences are those of rounding. The largest ones measured are at
most half of the tolerances stated here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.config import BitGenConfig
from bitgen.model.attention import masked_attention
from bitgen.model.bitgen import BitGenModel
from bitgen.model.masks import AttentionMask, mask_value
from bitgen.model.ternary import TernaryLinear

from . import numpy_reference as reference

LOGITS = 1e-4
"""Largest difference of logits of about a unit, float32 against float64."""

SMALL = BitGenConfig(
    vocab_size=23, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6,
    intermediate_size=20, max_positions=64, rope_theta=100.0, rms_norm_eps=1e-5, image_size=8,
    patch_size=4, encoder_hidden_size=8, encoder_layers=1, encoder_heads=2,
    encoder_intermediate_size=8, quantization="none", attention_mode="causal",
)  # fmt: skip


def make_model(**changes: Any) -> BitGenModel:
    """Random weights under which every branch counts: norms around 1, logits of a unit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BitGenModel(replace(SMALL, **changes)).eval()
        with torch.no_grad():
            torch.nn.init.normal_(model.text_decoder.embed_tokens.weight, std=0.25)
            for parameter in model.text_decoder.parameters():
                if parameter.dim() == 1:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def reference_of(model: BitGenModel) -> reference.Decoder:
    return reference.Decoder(
        weights={
            name: tensor.detach().double().numpy()
            for name, tensor in model.text_tower_state_dict().items()
        },
        num_heads=model.config.num_heads,
        num_kv_heads=model.config.num_kv_heads,
        rope_theta=model.config.rope_theta,
        eps=model.config.rms_norm_eps,
        ternary=model.config.quantization == "ternary",
    )


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL.vocab_size, (batch, length), generator=generator)


def causal_logits(model: BitGenModel, ids: torch.Tensor, valid: np.ndarray) -> np.ndarray:
    """The reference's logits `[B, L, V]` of text alone, in causal mode."""
    decoder = reference_of(model)
    added = reference.additive_mask(valid, [reference.causal()])
    return decoder.logits(decoder.embed(ids.numpy()), added, reference.distances(valid))


def embedded(model: BitGenModel, ids: torch.Tensor, images: torch.Tensor | None) -> np.ndarray:
    """Image tokens (as our encoder makes them) and embedded text, `[B, S, C]`."""
    x_BLC = reference_of(model).embed(ids.numpy())
    if images is None:
        return x_BLC
    with torch.no_grad():
        return np.concatenate([model.encode_images(images).double().numpy(), x_BLC], axis=1)


def difference(ours: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(ours.shape) == expected.shape
    return float(np.abs(ours.detach().double().numpy() - expected).max())


def assert_near(ours: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    found = difference(ours, expected)
    assert found <= tolerance  # false for nan


# Masks and attention ----------------------------------------------------------------------------


@dataclass
class Case:
    """One mask twice: ours, and the terms that the reference's loops read."""

    ours: AttentionMask
    valid_BK: np.ndarray
    rules: list[reference.Rule]
    customs: list[np.ndarray]
    queries: int
    offset: int

    def added(self, num_heads: int = 1) -> np.ndarray:
        return reference.additive_mask(
            self.valid_BK, self.rules, self.customs, num_heads, self.queries, self.offset
        )


TERMS = ("bidirectional", "causal", "prefix", "window", "windowed", "padding", "bool", "additive")


@dataclass(frozen=True)
class Sizes:
    batch: int
    groups: int
    per_group: int
    queries: int
    keys: int
    width: int

    @property
    def heads(self) -> int:
        return self.groups * self.per_group


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    keys = draw(st.integers(1, 12))
    return Sizes(
        batch=draw(st.integers(1, 3)),
        groups=draw(st.integers(1, 3)),
        per_group=draw(st.integers(1, 3)),
        queries=draw(st.one_of(st.just(keys), st.integers(1, keys))),
        keys=keys,
        width=draw(st.sampled_from([2, 4, 8, 10])),
    )


def build_case(terms: tuple[str, ...], size: Sizes, seed: int) -> Case:
    """The conjunction of these terms, with random numbers in each."""
    random = np.random.default_rng(seed)
    batch, keys, offset = size.batch, size.keys, size.keys - size.queries
    mask = AttentionMask.bidirectional()
    valid = np.ones((batch, keys), dtype=bool)
    rules: list[reference.Rule] = []
    customs: list[np.ndarray] = []
    for term in terms:
        if term == "causal":
            mask = mask & AttentionMask.causal()
            rules.append(reference.causal())
        elif term == "prefix":
            lengths = random.integers(0, keys + 2, size=batch).tolist()
            mask = mask & AttentionMask.prefix(torch.tensor(lengths))
            rules.append(reference.prefix(lengths))
        elif term in ("window", "windowed"):
            window, sinks = int(random.integers(1, keys + 2)), int(random.integers(0, 4))
            if term == "window":
                mask = mask & AttentionMask.sliding_window(window, sinks)
                rules.append(reference.sliding_window(window, sinks))
            else:
                mask = mask.windowed(window, sinks)
                rules.append(reference.within_window(window, sinks))
        elif term == "padding":
            given_valid = random.random((batch, keys)) < random.choice([0.3, 0.8])
            given_valid[0] &= random.random() < 0.7  # now and then a row of padding alone
            mask = mask & AttentionMask.padding(torch.from_numpy(given_valid))
            valid &= given_valid
        elif term in ("bool", "additive"):
            custom = _random_custom(random, size, is_bool=term == "bool")
            mask = mask & AttentionMask.custom(torch.from_numpy(custom))
            while custom.ndim < 4:
                custom = custom[None] if custom.ndim == 2 else custom[:, None]
            customs.append(custom)
    return Case(mask.at_offset(offset), valid, rules, customs, size.queries, offset)


def _random_custom(random: np.random.Generator, size: Sizes, is_bool: bool) -> np.ndarray:
    shape = random.choice(
        np.array(["QK", "BQK", "BHQK", "1HQK", "B1QK", "11QK"]),
    )
    letters = {"B": size.batch, "H": size.heads, "Q": size.queries, "K": size.keys, "1": 1}
    allowed = random.random([letters[letter] for letter in shape]) < random.choice([0.2, 0.7])
    if is_bool:
        return allowed
    forbidding = random.choice([-np.inf, np.finfo(np.float32).min, -1e9, -1e4])
    amounts = -3 * random.random(allowed.shape)
    return np.where(allowed, amounts, forbidding).astype(np.float32)


terms_of_a_mask = st.lists(st.sampled_from(TERMS), max_size=3).map(tuple)
seeds = st.integers(0, 2**32 - 1)


@given(terms_of_a_mask, sizes(), seeds)
@settings(deadline=None, max_examples=200, derandomize=True)
def test_masks_equal_their_loops(terms: tuple[str, ...], size: Sizes, seed: int) -> None:
    case = build_case(terms, size, seed)
    added = case.added(size.heads)
    shape = (size.batch, size.heads, size.queries, size.keys)
    allowed = case.ours.to_bool(size.queries, size.keys).expand(shape).numpy()
    assert np.array_equal(allowed, np.isfinite(added))
    additive = case.ours.to_additive(size.queries, size.keys, torch.float64).expand(shape).numpy()
    np.testing.assert_allclose(additive[allowed], added[allowed], atol=1e-6)
    assert (additive[~allowed] == mask_value(torch.float64)).all()


TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 6e-2,
}
"""Outputs, weights and gradients of units, against float64 of the same (rounded) inputs."""


def hold_attention_to_reference(case: Case, size: Sizes, seed: int, dtype: torch.dtype) -> None:
    """Forward and backward, fused and written out; fused without gradient, too: that may choose
    another kernel."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (size.batch, size.heads, size.queries, size.width),
        (size.batch, size.groups, size.keys, size.width),
        (size.batch, size.groups, size.keys, size.width),
        (size.batch, size.heads, size.queries, size.width),
    ]
    q, k, v, gradient = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().numpy() for x in (*inputs, gradient)]
    added = case.added(size.heads)
    output, weights = reference.attention(*exact[:3], added)
    gradients = reference.attention_gradients(*exact[:3], weights, exact[3])
    is_dead = torch.from_numpy(~np.isfinite(added).any(axis=-1))
    with torch.no_grad():
        inferred, _ = masked_attention(*inputs, case.ours)
    assert_near(inferred, output, TOLERANCES[dtype])
    assert not inferred[is_dead].any()
    for return_weights in (False, True):
        ours, our_weights = masked_attention(*inputs, case.ours, return_weights)
        assert ours.dtype == dtype
        if return_weights:
            assert our_weights is not None
            assert our_weights.dtype == torch.promote_types(dtype, torch.float32)
            assert_near(our_weights, weights, TOLERANCES[dtype])
            assert not our_weights[is_dead].any()
        assert_near(ours, output, TOLERANCES[dtype])
        our_gradients = torch.autograd.grad(ours, inputs, gradient)
        for one, other in zip(our_gradients, gradients, strict=True):
            assert_near(one, other, TOLERANCES[dtype])
        assert not ours[is_dead].any() and not our_gradients[0][is_dead].any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@given(terms=terms_of_a_mask, size=sizes(), seed=seeds)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_attention_equals_numpy_forward_and_backward(
    dtype: torch.dtype, terms: tuple[str, ...], size: Sizes, seed: int
) -> None:
    hold_attention_to_reference(build_case(terms, size, seed), size, seed, dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["padding", "bool", "-inf", "minimum", "-1e4"])
def test_queries_without_keys_give_zeros_and_finite_gradients(
    dtype: torch.dtype, kind: str
) -> None:
    size = Sizes(batch=2, groups=1, per_group=2, queries=5, keys=5, width=8)
    allowed = np.ones((2, 1, 5, 5), dtype=bool)
    allowed[0, :, 2:4] = False  # two queries of row 0
    allowed[1] = False  # all queries of row 1
    valid = np.ones((2, 5), dtype=bool)
    customs = [allowed]
    if kind == "padding":
        valid, customs = np.array([[True, True, False, False, True], [False] * 5]), []
        mask = AttentionMask.padding(torch.from_numpy(valid))
    elif kind == "bool":
        mask = AttentionMask.custom(torch.from_numpy(allowed))
    else:
        # As callers make them: in the dtype of the scores.
        lowest = {"-inf": -torch.inf, "minimum": torch.finfo(dtype).min, "-1e4": -1e4}[kind]
        additive = torch.zeros(2, 1, 5, 5, dtype=dtype)
        mask = AttentionMask.custom(additive.masked_fill(~torch.from_numpy(allowed), lowest))
    case = Case(mask, valid, [], customs, queries=5, offset=0)
    assert np.isneginf(case.added()).all(axis=-1).sum() == 7
    hold_attention_to_reference(case, size, 0, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("terms", [("causal",), ("prefix", "padding"), ("window", "additive")])
@pytest.mark.parametrize(("queries", "keys"), [(90, 90), (3, 600)])
def test_attention_over_several_blocks_of_the_kernel_equals_numpy(
    queries: int, keys: int, terms: tuple[str, ...], dtype: torch.dtype
) -> None:
    size = Sizes(batch=1, groups=1, per_group=2, queries=queries, keys=keys, width=64)
    hold_attention_to_reference(build_case(terms, size, 0), size, 0, dtype)


# The decoder ------------------------------------------------------------------------------------

PADDINGS = {
    "none": [[1, 1, 1, 1, 1, 1, 1, 1]] * 3,
    "left": [[1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
    "gaps": [[1, 0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]],
}


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("with_images", [False, True], ids=["text", "images"])
@pytest.mark.parametrize("mode", ["causal", "prefix", "bidirectional"])
def test_logits_of_every_mode_equal_numpy(mode: str, with_images: bool, padding: str) -> None:
    model = make_model(attention_mode=mode)
    ids, valid = random_ids(3, 8), np.array(PADDINGS[padding], dtype=bool)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    num_images = model.num_image_tokens if with_images else 0
    x_BSC = embedded(model, ids, images if with_images else None)
    valid_BS = np.concatenate([np.ones((3, num_images), dtype=bool), valid], axis=1)
    rules = {
        "causal": [reference.causal()],
        "prefix": [reference.prefix([num_images] * 3)],
        "bidirectional": [],
    }[mode]
    added = reference.additive_mask(valid_BS, rules)
    expected = reference_of(model).logits(x_BSC, added, reference.distances(valid_BS))
    with torch.no_grad():
        output = model(
            ids,
            images if with_images else None,
            torch.from_numpy(valid).long(),
            return_analysis_data=True,
        )
        fused = model(ids, images if with_images else None, torch.from_numpy(valid).long()).logits
    assert_near(fused, expected[:, num_images:], LOGITS)
    assert_near(output.logits, expected[:, num_images:], LOGITS)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("lengths", [(3, 2, 1), (0, 8, 5)])
def test_logits_of_prompts_equal_numpy(padding: str, lengths: tuple[int, ...]) -> None:
    model = make_model(attention_mode="prefix")
    ids, valid = random_ids(3, 8), np.array(PADDINGS[padding], dtype=bool)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    has_image = np.array([True, False, True])
    num_images = model.num_image_tokens
    image_valid = np.repeat(has_image[:, None], num_images, axis=1)
    valid_BS = np.concatenate([image_valid, valid], axis=1)
    ends = [num_images * int(has) + length for has, length in zip(has_image, lengths, strict=True)]
    added = reference.additive_mask(valid_BS, [reference.prefix(ends)])
    x_BSC = embedded(model, ids, images)
    expected = reference_of(model).logits(x_BSC, added, reference.distances(valid_BS))
    mask = model.build_attention_mask(
        torch.from_numpy(valid), torch.tensor(lengths), torch.from_numpy(has_image)
    )
    with torch.no_grad():
        logits = model(ids, images, mask).logits
    assert_near(logits, expected[:, num_images:], LOGITS)
    causal_alone = reference.additive_mask(valid_BS, [reference.causal()])
    other = reference_of(model).logits(x_BSC, causal_alone, reference.distances(valid_BS))
    assert np.abs(other - expected).max() > 1e-2  # the prefix does change the answer


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1), (6, 3)], ids=str)
def test_logits_under_window_and_custom_masks_equal_numpy(
    padding: str, heads: tuple[int, int]
) -> None:
    num_heads, num_kv_heads = heads
    model = make_model(num_heads=num_heads, num_kv_heads=num_kv_heads)
    ids, valid = random_ids(3, 8), np.array(PADDINGS[padding], dtype=bool)
    expected_by = reference_of(model)
    x_BSC, apart = expected_by.embed(ids.numpy()), reference.distances(valid)
    ours_of_padding = AttentionMask.padding(torch.from_numpy(valid))
    random = np.random.default_rng(0)
    allowed = random.random((3, num_heads, 8, 8)) < 0.6
    additive = np.where(allowed, -2 * random.random(allowed.shape), -np.inf).astype(np.float32)
    window, prefix = reference.sliding_window(3, sinks=2), reference.prefix([5, 2, 4])
    as_bool, as_additive = torch.from_numpy(allowed), torch.from_numpy(additive)
    cases: list[tuple[Any, list[reference.Rule], list[np.ndarray]]] = [
        (AttentionMask.sliding_window(3, sinks=2), [window], []),
        (AttentionMask.sliding_window(1), [reference.sliding_window(1)], []),
        (AttentionMask.custom(as_bool), [], [allowed]),
        (AttentionMask.custom(as_additive), [], [additive]),
        (
            AttentionMask.custom(as_additive) & AttentionMask.prefix([5, 2, 4]),
            [prefix],
            [additive],
        ),
    ]
    with torch.no_grad():
        for ours, rules, customs in cases:
            added = reference.additive_mask(valid, rules, customs, num_heads)
            expected = expected_by.logits(x_BSC, added, apart)
            logits = model(ids, attention_mask=ours & ours_of_padding).logits
            assert_near(logits, expected, LOGITS)
        if padding == "none":  # a tensor alone states all: nothing is padding
            for tensor, custom in ((as_bool, allowed), (as_additive, additive)):
                added = reference.additive_mask(valid, [], [custom], num_heads)
                expected = expected_by.logits(x_BSC, added, apart)
                assert_near(model(ids, attention_mask=tensor).logits, expected, LOGITS)


def test_a_mask_over_text_is_extended_over_the_picture() -> None:
    """Text sees all of the picture, and the picture itself alone."""
    model = make_model(attention_mode="bidirectional")
    ids, num_images = random_ids(3, 8), model.num_image_tokens
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    random, length = np.random.default_rng(0), num_images + 8
    allowed = random.random((3, 1, 8, 8)) < 0.5
    additive = np.where(allowed, -2 * random.random(allowed.shape), -np.inf).astype(np.float32)
    x_BSC, valid = embedded(model, ids, images), np.ones((3, length), dtype=bool)
    for custom in (allowed, additive):
        extended = np.zeros((3, 1, length, length))
        extended[:, :, :num_images, num_images:] = -np.inf
        extended[:, :, num_images:, num_images:] = additive if custom is additive else 0.0
        extended[:, :, num_images:, num_images:][~allowed] = -np.inf
        added = reference.additive_mask(valid, [], [extended])
        expected = reference_of(model).logits(x_BSC, added, reference.distances(valid))
        with torch.no_grad():
            logits = model(ids, images, torch.from_numpy(custom)).logits
        assert_near(logits, expected[:, num_images:], LOGITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 10000.0},
        {"rope_theta": 500000.0, "rms_norm_eps": 1e-3},
        {"head_dim": 2},
        {"num_heads": 3, "num_kv_heads": 1, "head_dim": 10, "hidden_size": 31},
        {"num_layers": 1, "intermediate_size": 13, "hidden_size": 17},
    ],
    ids=str,
)
def test_logits_of_other_shapes_and_constants_equal_numpy(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    ids, valid = random_ids(2, 40), np.ones((2, 40), dtype=bool)
    expected = causal_logits(model, ids, valid)
    with torch.no_grad():
        assert_near(model(ids).logits, expected, LOGITS)


def test_attention_weights_of_the_analysis_data_equal_numpy() -> None:
    """Of the first layer, whose inputs are the embeddings."""
    model = make_model()
    ids, valid = random_ids(3, 8), np.array(PADDINGS["gaps"], dtype=bool)
    weights, heads = reference_of(model).weights, (model.config.num_heads, 2)
    layer = "model.layers.0"
    x_BSC = reference.rms_norm(
        reference_of(model).embed(ids.numpy()), weights[f"{layer}.input_layernorm.weight"], 1e-5
    )
    q, k = (
        np.stack(np.split(x_BSC @ weights[f"{layer}.self_attn.{n}.weight"].T, h, axis=-1), axis=1)
        for n, h in zip(("q_proj", "k_proj"), heads, strict=True)
    )
    added = reference.additive_mask(valid, [reference.causal()])
    _, expected = reference.attention(q, k, k, added, reference.distances(valid), 100.0)
    with torch.no_grad():
        output = model(
            ids, attention_mask=torch.from_numpy(valid).long(), return_analysis_data=True
        )
    assert_near(output.attentions[0], expected, 1e-6)


# Quantized --------------------------------------------------------------------------------------


def test_each_ternary_linear_equals_numpy() -> None:
    """An input within rounding of a half may be decided otherwise, and then moves by one step."""
    model = make_model(quantization="ternary")
    layers = [m for m in model.text_decoder.modules() if isinstance(m, TernaryLinear)]
    assert len(layers) == 7 * SMALL.num_layers
    num_undecided = 0
    for seed, layer in enumerate(layers):
        x = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(seed))
        weight, x64 = layer.weight.detach().double().numpy(), x.double().numpy()
        with torch.no_grad():
            found = np.abs(layer(x).double().numpy() - reference.linear(x64, weight, ternary=True))
        _, token_scale = reference.quantized_activation(x64)
        undecided_M1 = (np.abs(x64 * token_scale % 1 - 0.5) < 1e-4).sum(axis=1, keepdims=True)
        step_M1 = reference.quantized_weight(weight)[1] / token_scale
        assert (found <= 1e-5 + undecided_M1 * step_M1).all()
        num_undecided += int(undecided_M1.sum())
    assert num_undecided < 10  # so that the bound above is that of equality nearly everywhere


def test_ternary_logits_equal_numpy_but_for_rounding_ties() -> None:
    """No such tie was met in 1,440 positions; other machines sum in another order."""
    model = make_model(quantization="ternary")
    ids, valid = random_ids(3, 8), np.array(PADDINGS["gaps"], dtype=bool)
    expected = causal_logits(model, ids, valid)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.from_numpy(valid).long()).logits
    found = np.abs(logits.double().numpy() - expected).max(axis=-1)
    assert (found > LOGITS).mean() <= 0.1
    assert found.max() < 0.1  # a step of int8


# Gradients --------------------------------------------------------------------------------------


GRADIENTS = 2e-5
"""Difference of an entry, as a share of the largest entry of the same parameter."""


@pytest.mark.parametrize(
    ("mode", "padding", "with_images"),
    [
        ("causal", "left", False),
        ("prefix", "gaps", True),
        ("bidirectional", "right", True),
        ("window", "gaps", False),
    ],
)
def test_gradients_equal_finite_differences(mode: str, padding: str, with_images: bool) -> None:
    """Of the mean loss over the text, by three entries of every parameter of the text tower."""
    is_window = mode == "window"
    model = make_model(attention_mode="causal" if is_window else mode)
    ids, valid = random_ids(3, 8), np.array(PADDINGS[padding], dtype=bool)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    num_images = model.num_image_tokens if with_images else 0
    valid_BS = np.concatenate([np.ones((3, num_images), dtype=bool), valid], axis=1)
    rules = {
        "causal": [reference.causal()],
        "prefix": [reference.prefix([num_images + 3, num_images, num_images + 1])],
        "bidirectional": [],
        "window": [reference.sliding_window(2, sinks=1)],
    }[mode]
    added, apart = reference.additive_mask(valid_BS, rules), reference.distances(valid_BS)
    decoder = reference_of(model)
    image_BPC = embedded(model, ids, images)[:, :num_images] if with_images else None
    labels, kept = random_ids(3, 8, seed=7).numpy(), valid.nonzero()

    def expected_loss() -> float:
        x_BSC = decoder.embed(ids.numpy())
        if image_BPC is not None:
            x_BSC = np.concatenate([image_BPC, x_BSC], axis=1)
        logits = decoder.logits(x_BSC, added, apart)[:, num_images:]
        logits = logits - logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return -float(log_probabilities[(*kept, labels[kept])].mean())

    if is_window:
        padded = AttentionMask.padding(torch.from_numpy(valid))
        mask = AttentionMask.sliding_window(2, sinks=1) & padded
    else:
        prompts = torch.tensor([3, 0, 1]) if mode == "prefix" else None
        mask = model.build_attention_mask(torch.from_numpy(valid), prompts, has_images=with_images)
    logits = model(ids, images if with_images else None, mask).logits
    loss = torch.nn.functional.cross_entropy(
        logits[torch.from_numpy(valid)], torch.from_numpy(labels[kept])
    )
    loss.backward()
    assert abs(loss.item() - expected_loss()) < 1e-5
    random, step = np.random.default_rng(0), 1e-5
    parameters = dict(model.text_decoder.named_parameters())
    for name, parameter in parameters.items():
        weights, ours = decoder.weights[f"model.{name}"].reshape(-1), parameter.grad
        assert ours is not None and ours.any()
        for index in random.choice(weights.size, 3, replace=False):
            held = weights[index]
            weights[index] = held + step
            above = expected_loss()
            weights[index] = held - step
            below = expected_loss()
            weights[index] = held
            expected = np.array((above - below) / (2 * step))
            assert_near(ours.flatten()[index], expected, GRADIENTS * float(ours.abs().max()))


# Caches -----------------------------------------------------------------------------------------


CHUNKS = {"one by one": 1, "by two": 2, "by seven": 7, "at once": None, "at random": 0}


def cut(length: int, chunk: str, random: np.random.Generator) -> list[int]:
    """Columns of each step."""
    size = CHUNKS[chunk]
    steps: list[int] = []
    while (rest := length - sum(steps)) > 0:
        wanted = int(random.integers(1, rest + 1)) if size == 0 else size or rest
        steps.append(min(wanted, rest))
    return steps


PADDING_KINDS = ("none", "left", "right, then decoding", "anywhere")


def random_padding(kind: str, batch: int, steps: list[int], random: np.random.Generator) -> Any:
    """`[B, sum(steps)]`, False where padding stands."""
    length = sum(steps)
    valid = np.ones((batch, length), dtype=bool)
    if kind == "left":
        valid = np.arange(length) >= random.integers(0, length, (batch, 1))
    elif kind == "right, then decoding":  # rows of the first step are filled up on the right
        valid[:, : steps[0]] = np.arange(steps[0]) < random.integers(0, steps[0] + 1, (batch, 1))
    elif kind == "anywhere":
        valid = random.random((batch, length)) < 0.7
    return valid


def random_prefixes(valid: np.ndarray, steps: list[int], random: np.random.Generator) -> list[int]:
    """Of no more tokens than a row has in its first step with any: a prefix is read in one."""
    ends = np.cumsum(steps)
    counts = np.array([valid[:, :end].sum(axis=1) for end in ends])
    return [int(random.integers(0, row[(row > 0).argmax()] + 1)) for row in counts.T]


def read_in_steps(
    model: BitGenModel,
    cache: Any,
    ids: torch.Tensor,
    valid: np.ndarray,
    steps: list[int],
    rules: AttentionMask | None,
    covers_all: bool,
) -> torch.Tensor:
    """Logits of cached steps; padding of the new columns, or of all so far, given beside `rules`.

    Without rules padding goes as a plain tensor, or not at all where a step holds none.
    """
    logits, start, padding = [], 0, torch.from_numpy(valid)
    for size in steps:
        end = start + size
        mask: Any = None
        if rules is not None:
            mask = rules & AttentionMask.padding(padding[:, 0 if covers_all else start : end])
        elif not valid[:, start:end].all():
            mask = padding[:, start:end].long()
        with torch.no_grad():
            output = model(ids[:, start:end], attention_mask=mask, attention_cache=cache)
        logits.append(output.logits)
        start = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("rule", ["mode", "causal", "prefix", "window", "custom", "additive"])
@pytest.mark.parametrize("chunk", CHUNKS)
@given(
    length=st.integers(1, 14),
    batch=st.integers(1, 3),
    kind=st.sampled_from(PADDING_KINDS),
    covers_all=st.booleans(),
    seed=seeds,
)
@settings(deadline=None, max_examples=15, derandomize=True)
def test_static_cache_equals_numpy_for_any_chunking(
    chunk: str, rule: str, length: int, batch: int, kind: str, covers_all: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    steps = cut(length, chunk, random)
    ids, valid = random_ids(batch, length, seed), random_padding(kind, batch, steps, random)
    reference_rules, customs = [reference.causal()], []
    rules: AttentionMask | None = AttentionMask.causal()
    if rule == "mode":
        rules = None
    elif rule == "prefix":
        lengths = random_prefixes(valid, steps, random)
        rules, reference_rules = AttentionMask.prefix(lengths), [reference.prefix(lengths)]
    elif rule == "window":
        window, sinks = int(random.integers(1, 6)), int(random.integers(0, 4))
        rules = AttentionMask.sliding_window(window, sinks)
        reference_rules = [reference.sliding_window(window, sinks)]
    elif rule in ("custom", "additive"):
        custom = np.tril(random.random((batch, SMALL.num_heads, length, length)) < 0.7)
        if rule == "additive":
            amounts = -2 * random.random(custom.shape)
            custom = np.where(custom, amounts, -np.inf).astype(np.float32)
        rules, reference_rules = AttentionMask.custom(torch.from_numpy(custom)), []
        customs = [custom]
    cache = MODEL.new_cache(batch, length)
    logits = read_in_steps(MODEL, cache, ids, valid, steps, rules, covers_all)
    assert cache.length == length
    added = reference.additive_mask(valid, reference_rules, customs, SMALL.num_heads)
    expected = DECODER.logits(DECODER.embed(ids.numpy()), added, reference.distances(valid))
    assert_near(logits, expected, LOGITS)


@pytest.mark.parametrize("rule", ["mode", "causal", "narrower", "prefix"])
@pytest.mark.parametrize("chunk", CHUNKS)
@given(
    length=st.integers(1, 24),
    batch=st.integers(1, 3),
    kind=st.sampled_from(PADDING_KINDS),
    window=st.integers(1, 8),
    sinks=st.integers(0, 4),
    covers_all=st.booleans(),
    seed=seeds,
)
@settings(deadline=None, max_examples=25, derandomize=True)
def test_sliding_window_cache_equals_numpy_for_any_chunking(
    chunk: str,
    rule: str,
    length: int,
    batch: int,
    kind: str,
    window: int,
    sinks: int,
    covers_all: bool,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    steps = cut(length, chunk, random)
    ids, valid = random_ids(batch, length, seed), random_padding(kind, batch, steps, random)
    reference_rules = [reference.sliding_window(window, sinks)]
    rules = None if rule == "mode" else AttentionMask.causal()
    if rule == "narrower":
        rules = AttentionMask.sliding_window(max(1, window - 2), max(0, sinks - 1))
        reference_rules.append(reference.sliding_window(max(1, window - 2), max(0, sinks - 1)))
    elif rule == "prefix":  # it keeps its both ways within the window
        lengths = random_prefixes(valid, steps, random)
        rules = AttentionMask.prefix(lengths)
        reference_rules = [reference.prefix(lengths), reference.within_window(window, sinks)]
    cache = MODEL.new_sliding_window_cache(batch, window, sinks)
    logits = read_in_steps(MODEL, cache, ids, valid, steps, rules, covers_all)
    added = reference.additive_mask(valid, reference_rules)
    expected = DECODER.logits(DECODER.embed(ids.numpy()), added, reference.distances(valid))
    assert_near(logits, expected, LOGITS)


@pytest.mark.parametrize("chunk", ["by two", "by seven", "at random"])
@given(
    length=st.integers(1, 14),
    batch=st.integers(1, 3),
    kind=st.sampled_from(PADDING_KINDS),
    window=st.integers(1, 8),
    sinks=st.integers(0, 4),
    seed=seeds,
)
@settings(deadline=None, max_examples=15, derandomize=True)
def test_sliding_window_cache_beyond_max_positions_equals_numpy_with_held_sinks(
    chunk: str, length: int, batch: int, kind: str, window: int, sinks: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    steps = cut(length, chunk, random) + [1] * 26
    ids = random_ids(batch, sum(steps), seed)
    valid = random_padding(kind, batch, steps, random)
    cache = SHORT_MODEL.new_sliding_window_cache(batch, window, sinks)
    logits = read_in_steps(SHORT_MODEL, cache, ids, valid, steps, None, covers_all=False)
    added = reference.additive_mask(valid, [reference.sliding_window(window, sinks)])
    most = SHORT_MODEL.config.max_positions
    apart = reference.distances_with_held_sinks(valid, sinks, most)
    expected = DECODER.logits(DECODER.embed(ids.numpy()), added, apart)
    assert_near(logits, expected, LOGITS)
    if sinks and int(valid.sum(axis=1).max()) > most + 8:
        true_distances = reference.distances(valid)
        other = DECODER.logits(DECODER.embed(ids.numpy()), added, true_distances)
        assert np.abs(other - expected).max() > 1e-3  # holding the sinks does change the answer


@pytest.mark.parametrize("is_sliding", [False, True], ids=["static", "sliding"])
@given(
    length=st.integers(1, 14),
    chunk=st.sampled_from(list(CHUNKS)),
    kind=st.sampled_from(PADDING_KINDS),
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    seed=seeds,
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_reordered_caches_equal_numpy(
    is_sliding: bool, length: int, chunk: str, kind: str, rows: list[int], seed: int
) -> None:
    """Read some steps, choose rows anew (as many, fewer or more), and read on."""
    random = np.random.default_rng(seed)
    steps, later = cut(length, chunk, random), 5
    ids, valid = random_ids(3, length, seed), random_padding(kind, 3, steps, random)
    cache: Any = MODEL.new_cache(3, length + later)
    rule = reference.causal()
    if is_sliding:
        cache, rule = MODEL.new_sliding_window_cache(3, 4, 2), reference.sliding_window(4, 2)
    read_in_steps(MODEL, cache, ids, valid, steps, None, covers_all=False)
    cache.reorder(torch.tensor(rows))
    new_ids = random_ids(len(rows), later, seed + 1)
    new_valid = np.ones((len(rows), later), dtype=bool)
    logits = read_in_steps(MODEL, cache, new_ids, new_valid, [1, 3, 1], None, covers_all=False)
    all_ids = torch.cat([ids[rows], new_ids], dim=1)
    all_valid = np.concatenate([valid[rows], new_valid], axis=1)
    added, apart = reference.additive_mask(all_valid, [rule]), reference.distances(all_valid)
    expected = DECODER.logits(DECODER.embed(all_ids.numpy()), added, apart)
    assert_near(logits, expected[:, length:], LOGITS)


@pytest.mark.parametrize("padding", ["none", "left", "gaps"])
@pytest.mark.parametrize("mode", ["causal", "prefix"])
@pytest.mark.parametrize("is_sliding", [False, True], ids=["static", "sliding"])
def test_caches_with_pictures_equal_numpy(is_sliding: bool, mode: str, padding: str) -> None:
    """Picture and prompt in one step, one row without a picture, and then token by token."""
    model = make_model(attention_mode=mode)
    ids, valid = random_ids(3, 8), np.array(PADDINGS[padding], dtype=bool)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    has_image, num_images = np.array([True, False, True]), model.num_image_tokens
    valid_BS = np.concatenate([np.repeat(has_image[:, None], num_images, axis=1), valid], axis=1)
    prompts = valid[:, :3].sum(axis=1)
    rules = [reference.causal()]
    if mode == "prefix":
        rules = [reference.prefix((has_image * num_images + prompts).tolist())]
    cache: Any = model.new_cache(3, num_images + 8)
    if is_sliding:
        cache = model.new_sliding_window_cache(3, window=4, sinks=3)
        rules.append(reference.within_window(4, sinks=3))
    first = model.build_attention_mask(
        torch.from_numpy(valid[:, :3]), torch.from_numpy(prompts), torch.from_numpy(has_image)
    )
    with torch.no_grad():
        logits = [model(ids[:, :3], images, first, attention_cache=cache).logits]
        for column in range(3, 8):
            one = torch.from_numpy(valid[:, column : column + 1]).long()
            step = model(ids[:, column : column + 1], attention_mask=one, attention_cache=cache)
            logits.append(step.logits)
    added, apart = reference.additive_mask(valid_BS, rules), reference.distances(valid_BS)
    expected = reference_of(model).logits(embedded(model, ids, images), added, apart)
    assert_near(torch.cat(logits, dim=1), expected[:, num_images:], LOGITS)


MODEL = make_model()
SHORT_MODEL = make_model(max_positions=16)
DECODER = reference_of(MODEL)
