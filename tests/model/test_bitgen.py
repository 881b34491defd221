"""The whole model: padding, modes, cache, analysis data, and an outside reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from bitgen.config import BitGenConfig
from bitgen.errors import ModelFileError
from bitgen.model.bitgen import BitGenModel
from bitgen.model.robot_selector import RobotSelector
from bitgen.model.ternary import pack_ternary_layers

from .small_model import DENSE_AND_EXPERTS, small_config
from .small_model import small_model as make_model

Experts = dict[str, int]


def random_input(batch: int = 3, length: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (batch, length), generator=generator)
    return ids, torch.randn(batch, 3, 32, 32, generator=generator)


def test_output_holds_what_was_asked_for_and_nothing_else() -> None:
    model = make_model()
    ids, images = random_input()
    output = model(ids, images)
    assert output.logits.shape == (3, 7, 50)
    assert (output.robot_logits, output.attentions, output.pooled) == (None, None, None)
    output = model(ids, images, return_robot_selection=True, return_analysis_data=True)
    assert output.robot_logits.shape == (3, 3)
    assert output.pooled.shape == (3, 32)
    positions = model.num_image_tokens + 7
    assert [a.shape for a in output.attentions] == [(3, 4, positions, positions)] * 2
    text_only = model(ids, return_analysis_data=True)
    assert text_only.attentions[0].shape == (3, 4, 7, 7)


def test_the_residual_stem_is_what_its_definition_says() -> None:
    model = make_model(stem_residual_convolutions=2, patch_size=8)
    stem = model.image_encoder.stem
    strides = [convolution.stride[0] for convolution in stem.convolutions]
    assert strides == [2, 2, 1, 1, 2, 1, 1]  # none behind the first halving
    _, images = random_input()
    x = images.double()
    for convolution, norm in zip(stem.convolutions, stem.norms, strict=True):
        stride = convolution.stride[0]
        y = functional.conv2d(x, convolution.weight.double(), stride=stride, padding=1)
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        y = (y - mean[:, None, None]) / (variance[:, None, None] + 1e-3).sqrt()
        y = (y * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]).relu()
        x = y if stride == 2 else x + y
    torch.testing.assert_close(stem(images).double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_pictures", [2, 4, 64])
def test_pictures_are_normalised_in_groups_in_training(num_pictures: int) -> None:
    model = make_model().train()
    model.set_norm_batch(num_pictures)
    norm = model.image_encoder.stem.norms[0]
    x = torch.randn(5, norm.weight.numel(), 3, 3, generator=torch.Generator().manual_seed(1))
    found = norm(x)
    for first in range(0, 5, num_pictures):
        rows = x[first : first + num_pictures].double()
        variance, mean = torch.var_mean(rows, dim=(0, 2, 3), correction=0, keepdim=True)
        expected = (rows - mean) / (variance + 1e-3).sqrt()
        torch.testing.assert_close(
            found[first : first + num_pictures].double(), expected, rtol=1e-4, atol=1e-4
        )


def test_words_are_foretold_from_pictures_of_other_sizes() -> None:
    model = make_model(image_size=64)  # a grid of 4 x 4
    _, images = random_input()
    assert model.image_words(images).shape == (3, 50)
    encoder = model.image_encoder
    grid = encoder.position_embedding.detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    coarse = functional.interpolate(grid, (2, 2), mode="bilinear", antialias=True)
    torch.testing.assert_close(
        encoder._positions(2, 2), coarse.permute(0, 2, 3, 1).reshape(1, 4, -1)
    )
    assert encoder._positions(4, 4) is encoder.position_embedding
    with pytest.raises(ValueError, match=r"Expected images \[B, 3, 64, 64\]"):
        model.encode_images(images)


@DENSE_AND_EXPERTS
@pytest.mark.parametrize("quantization", ["none", "ternary"])
def test_fused_attention_equals_the_path_that_returns_weights(
    quantization: str, experts: Experts
) -> None:
    model = make_model(quantization=quantization, **experts)
    ids, images = random_input()
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    fused = model(ids, images, mask).logits
    weights = model(ids, images, mask, return_analysis_data=True)
    tolerance = 1e-5 if quantization == "none" else 0.1  # a rounding tie moves one int8 step
    assert (fused - weights.logits).abs().max() < tolerance
    sums = weights.attentions[0].sum(dim=-1)
    valid = torch.cat([torch.ones(3, model.num_image_tokens), mask], dim=1)[:, None]
    torch.testing.assert_close(sums, valid.expand_as(sums))


@DENSE_AND_EXPERTS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_side_changes_no_answer(side: str, experts: Experts) -> None:
    model = make_model(**experts)
    ids, images = random_input(batch=1)
    alone = model(ids, images, return_robot_selection=True)
    for filler in (0, 17):
        padding = torch.full((1, 4), filler)
        padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
        mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 7)], dim=1)
        mask = mask if side == "left" else mask.flip(1)
        output = model(padded, images, mask, return_robot_selection=True)
        kept = output.logits[:, 4:] if side == "left" else output.logits[:, :7]
        torch.testing.assert_close(kept, alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.robot_logits, alone.robot_logits, atol=1e-5, rtol=1e-5)


@DENSE_AND_EXPERTS
def test_padding_tokens_and_blank_pictures_change_nothing_bit_for_bit(experts: Experts) -> None:
    model = make_model(quantization="ternary", **experts)
    ids, images = random_input()
    valid = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    has_picture = torch.tensor([True, True, False])
    mask = model.build_attention_mask(valid, image_mask_B=has_picture)
    first = model(ids, images, mask, return_robot_selection=True)
    other_ids = torch.where(valid.bool(), ids, (ids + 11) % 50)
    other_images = images.clone()
    other_images[2] = 123.0
    second = model(other_ids, other_images, mask, return_robot_selection=True)
    assert torch.equal(first.logits[valid.bool()], second.logits[valid.bool()])
    assert torch.equal(first.robot_logits, second.robot_logits)


@DENSE_AND_EXPERTS
@pytest.mark.parametrize("mode", ["prefix", "causal", "bidirectional"])
def test_a_row_that_is_all_padding_stays_finite_and_alone(mode: str, experts: Experts) -> None:
    model = make_model(attention_mode=mode, **experts).train()
    ids, images = random_input()
    valid = torch.tensor([[1] * 7, [0] * 7, [1] * 7])
    mask = model.build_attention_mask(valid, image_mask_B=torch.tensor([True, False, True]))
    output = model(ids, images, mask, return_robot_selection=True)
    assert output.logits.isfinite().all() and output.robot_logits.isfinite().all()
    model.zero_grad()
    output.logits[[0, 2]].square().sum().backward()
    with_empty_row = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in with_empty_row.values())
    others = make_model(attention_mode=mode, **experts).train()
    mask = others.build_attention_mask(valid[[0, 2]])
    logits = others(ids[[0, 2]], images[[0, 2]], mask).logits
    torch.testing.assert_close(logits, output.logits[[0, 2]], atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    for name, parameter in others.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                with_empty_row[name], parameter.grad, atol=2e-4, rtol=1e-4, msg=name
            )


@DENSE_AND_EXPERTS
def test_a_row_without_picture_answers_as_text_alone(experts: Experts) -> None:
    model = make_model(**experts)
    ids, images = random_input()
    mask = model.build_attention_mask(torch.ones_like(ids), image_mask_B=torch.zeros(3))
    blank = model(ids, images, mask).logits
    torch.testing.assert_close(blank, model(ids).logits, atol=1e-5, rtol=1e-5)


def reach(model: BitGenModel, mask: object = None) -> torch.Tensor:
    """[L, L]: whether changing text token j changes the logits at text position i."""
    ids, images = random_input(batch=1)
    before = model(ids, images, mask).logits[0]
    rows = []
    for position in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, position] = 5 + (changed[0, position] - 4) % 45
        moved_L = (model(changed, images, mask).logits[0] - before).abs().amax(dim=-1)
        rows.append(moved_L > 2e-6)  # below it: sums over as many tokens as chose an expert
    return torch.stack(rows, dim=1)


@DENSE_AND_EXPERTS
def test_causal_and_bidirectional_modes_are_what_they_say(experts: Experts) -> None:
    lower = torch.ones(7, 7).tril().bool()
    assert torch.equal(reach(make_model(attention_mode="causal", **experts)), lower)
    assert torch.equal(reach(make_model(attention_mode="prefix", **experts)), lower)
    assert reach(make_model(attention_mode="bidirectional", **experts)).all()


def test_prompt_is_seen_both_ways_and_the_caption_is_causal() -> None:
    model = make_model()
    mask = model.build_attention_mask(torch.ones(1, 7), torch.tensor([3]))
    expected = torch.ones(7, 7).tril().bool()
    expected[:3, :3] = True
    # The prompt reaches image tokens too, but no caption position before the one it stands at.
    assert torch.equal(reach(model, mask), expected)


@DENSE_AND_EXPERTS
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("left_padding", [False, True])
def test_cached_steps_equal_the_whole_forward(
    chunk: int, left_padding: bool, experts: Experts
) -> None:
    model = make_model(**experts)
    ids, images = random_input(length=9)
    valid = torch.ones(3, 9, dtype=torch.long)
    if left_padding:
        valid[1, :2] = 0
    prompts = valid[:, :3].sum(dim=1)
    whole = model(ids, images, model.build_attention_mask(valid, prompts)).logits
    cache = model.new_cache(3, model.num_image_tokens + 9)
    mask = model.build_attention_mask(valid[:, :3], prompts)
    steps = [model(ids[:, :3], images, mask, attention_cache=cache).logits]
    for start in range(3, 9, chunk):
        step_ids = ids[:, start : start + chunk]
        steps.append(model(step_ids, attention_cache=cache).logits)
    difference = (torch.cat(steps, dim=1) - whole).abs()
    assert difference[valid.bool()].max() < 1e-5
    assert cache.length == cache.max_length
    with pytest.raises(ValueError, match="Allocate a longer one"):
        model(ids[:, :1], attention_cache=cache)


@DENSE_AND_EXPERTS
def test_reordered_cache_continues_the_chosen_rows(experts: Experts) -> None:
    model = make_model(**experts)
    ids, images = random_input()
    rows = torch.tensor([2, 2, 0])
    cache = model.new_cache(3, model.num_image_tokens + 7)
    model(ids[:, :4], images, attention_cache=cache)
    cache.reorder(rows)
    step = model(ids[rows, 4:], attention_cache=cache).logits
    whole = model(ids[rows], images[rows]).logits[:, 4:]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)


def test_bidirectional_mode_refuses_a_cache() -> None:
    model = make_model(attention_mode="bidirectional")
    ids, images = random_input()
    with pytest.raises(ValueError, match="bidirectional"):
        model(ids, images, attention_cache=model.new_cache(3, 30))


def test_wrong_shapes_are_refused_with_both_shapes() -> None:
    model = make_model()
    ids, images = random_input()
    with pytest.raises(ValueError, match=r"\[B, 3, 32, 32\].*\(3, 3, 16, 16\)"):
        model(ids, images[..., :16, :16])
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(3, 7\)"):
        model(ids, images, torch.ones(3, 5))
    with pytest.raises(ValueError, match="max_positions"):
        model(ids.repeat(1, 20), images)
    fresh = BitGenModel(small_config())
    with pytest.raises(ValueError, match="set_robots"):
        fresh(ids, images, return_robot_selection=True)


def test_padding_is_read_in_every_usual_form() -> None:
    model = make_model()
    ids, images = random_input()
    valid = torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * 3)
    expected = model(ids, images, valid).logits[:, :5]
    additive = torch.zeros(3, 7).masked_fill(valid == 0, -1e9)
    forms = [valid.bool(), valid.float(), valid[:, None], valid[:, None, None], valid[:1]]
    forms += [additive, additive[:, None, None], additive[:1, None, None].half()]
    for form in forms:
        assert torch.equal(model(ids, images, form).logits[:, :5], expected)


def test_four_dimensional_text_mask_is_extended_over_the_picture() -> None:
    model = make_model(attention_mode="causal")
    ids, images = random_input()
    causal = torch.ones(1, 1, 7, 7).tril().bool()
    by_tensor = model(ids, images, causal).logits
    additive = torch.zeros(1, 1, 7, 7).masked_fill(~causal, float("-inf"))
    torch.testing.assert_close(by_tensor, model(ids, images, additive).logits)
    by_mode = make_model(attention_mode="prefix")(ids, images).logits
    torch.testing.assert_close(by_tensor, by_mode, atol=1e-5, rtol=1e-5)


@DENSE_AND_EXPERTS
def test_a_robot_can_be_added_and_keeps_the_others_scores(experts: Experts) -> None:
    model = make_model(**experts)
    with torch.no_grad():
        model.robot_selector.robot_bias.copy_(torch.tensor([1.0, -2.0]))
        ids, images = random_input()
        three = model(ids, images, return_robot_selection=True).robot_logits
        robots = torch.tensor([[4, 23, 0, 0], [4, 20, 21, 22]])
        model.set_robots(["Humanoid", "Drone"], robots, robots != 0)
        two = model(ids, images, return_robot_selection=True).robot_logits
    torch.testing.assert_close(two, three[:, [1, 0]], atol=1e-5, rtol=1e-5)


def test_robot_states_are_not_kept_across_new_weights() -> None:
    model = make_model()
    ids, images = random_input()
    with torch.no_grad():
        before = model(ids, images, return_robot_selection=True).robot_logits
        model.train()
        model.text_decoder.embed_tokens.weight.mul_(-1)
        model.eval()
        after = model(ids, images, return_robot_selection=True).robot_logits
        state = model.state_dict()
        fresh = make_model()
        fresh(ids, images, return_robot_selection=True)
        fresh.load_state_dict(state)
        loaded = fresh(ids, images, return_robot_selection=True).robot_logits
    assert not torch.allclose(before, after)
    assert torch.equal(loaded, after)


@pytest.mark.parametrize("size", ["nano", "tiny"])
def test_an_untrained_model_knows_nothing(size: str) -> None:
    torch.manual_seed(0)
    config = BitGenConfig.preset(size)
    model = BitGenModel(config).eval()
    ids = torch.randint(5, config.vocab_size, (4, 12))
    images = torch.randn(4, 3, config.image_size, config.image_size)
    with torch.no_grad():
        logits = model(ids, images).logits
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.05)


@DENSE_AND_EXPERTS
def test_packed_model_equals_the_trained_one_bit_for_bit(experts: Experts) -> None:
    model = make_model(quantization="ternary", **experts)
    ids, images = random_input()
    with torch.no_grad():
        trained = model(ids, images, return_robot_selection=True)
        pack_ternary_layers(model)
        packed = model(ids, images, return_robot_selection=True)
    assert torch.equal(trained.logits, packed.logits)
    assert torch.equal(trained.robot_logits, packed.robot_logits)


def test_every_weight_gets_a_gradient_from_caption_and_robot_losses() -> None:
    model = make_model(quantization="ternary").train()
    ids, images = random_input()
    output = model(ids, images, return_robot_selection=True)
    (output.logits.square().mean() + output.robot_logits.square().mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_image_words_come_from_the_picture_alone() -> None:
    model = make_model()
    ids, images = random_input()
    words = model(ids, images, return_image_words=True).image_words
    assert words.shape == (3, 50)
    assert torch.equal(words, model(ids.flip(1), images, return_image_words=True).image_words)
    assert not torch.allclose(words, model(ids, -images, return_image_words=True).image_words)
    assert model(ids, images).image_words is None
    assert model(ids, return_image_words=True).image_words is None


def test_blank_pictures_take_no_part_in_training_statistics() -> None:
    ids, images = random_input(batch=5)
    has_picture = torch.tensor([True, False, True, True, True])
    outputs = []
    for filler in (0.0, 50.0):
        model = make_model().train()
        filled = images.clone()
        filled[1] = filler
        mask = model.build_attention_mask(torch.ones_like(ids), image_mask_B=has_picture)
        outputs.append(model(ids, filled, mask).logits)
        statistics = model.image_encoder.stem.norms[0].running_mean
        assert int(model.image_encoder.stem.norms[0].num_groups) == 1
        outputs.append(statistics.clone())
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_statistics_of_small_batches_are_those_of_a_large_one() -> None:
    _, images = random_input(batch=8)
    whole, halves = make_model().image_encoder.train(), make_model().image_encoder.train()
    together, _ = whole(images)
    apart = torch.cat([halves(images[:4])[0], halves(images[4:])[0]])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(whole.buffers(), halves.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    # In evaluation a picture's features depend on no other picture.
    whole.eval()
    torch.testing.assert_close(whole(images)[0][:1], whole(images[:1])[0], atol=1e-5, rtol=1e-5)


# The text tower ---------------------------------------------------------------------------------


def test_a_text_tower_goes_out_and_comes_in_under_the_same_names() -> None:
    source, target = make_model(), make_model()
    for parameter in target.parameters():
        torch.nn.init.normal_(parameter)
    ids, images = random_input()
    target(ids, images, return_robot_selection=True)  # robots are kept encoded
    tower = source.text_tower_state_dict()
    assert torch.equal(tower["lm_head.weight"], tower["model.embed_tokens.weight"])
    assert tower["model.layers.1.self_attn.q_proj.weight"].shape == (32, 32)
    without_head = {name: t for name, t in tower.items() if name != "lm_head.weight"}
    target.load_text_tower(without_head)
    assert torch.equal(target(ids).logits, source(ids).logits)
    assert torch.equal(target.encode_robots(), source.encode_robots())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.norm.weight": None}, "1 tensors missing .*model.norm.weight"),
        ({"model.layers.7.mlp.bias": torch.ones(1)}, "1 that it does not know .*layers.7.mlp.bias"),
        ({"model.norm.weight": torch.ones(31)}, r"\(31,\); expected \(32,\)"),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.uint8)},
            "torch.uint8: packed weights",
        ),
        ({"lm_head.weight": torch.ones(50, 32)}, "ties them"),
    ],
)
def test_a_text_tower_that_does_not_fit_is_refused_and_nothing_is_loaded(
    change: dict[str, torch.Tensor | None], words: str
) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tower = {**{n: t + 1 for n, t in model.text_tower_state_dict().items()}, **change}
    given = {name: tensor for name, tensor in tower.items() if tensor is not None}
    with pytest.raises(ModelFileError, match=words):
        model.load_text_tower(given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_packed_model_has_no_text_tower() -> None:
    model = make_model(quantization="ternary")
    pack_ternary_layers(model)
    with pytest.raises(ValueError, match="packed=False"):
        model.text_tower_state_dict()


def test_a_selector_starts_from_the_shares_of_the_tasks_and_alike_for_both_texts() -> None:
    torch.manual_seed(0)
    names = ("Drone", "Diver", "Crane", "Cat")
    selector = RobotSelector(BitGenConfig.preset("nano", robot_names=names))
    assert torch.equal(selector.task_proj.weight, selector.robot_proj.weight)
    common_1C = 2 * torch.randn(1, 256)
    robots_RC, tasks_BC = (common_1C + torch.randn(count, 256) for count in (4, 200))
    shares = (0.5, 0.1, 0.0, 0.8)
    selector.start_from_shares(shares, robots_RC)
    logits_BR = selector(tasks_BC, robots_RC, names)
    expected = torch.logit(torch.tensor([0.5, 0.1, 0.02, 0.8]))
    torch.testing.assert_close(logits_BR.mean(dim=0), expected, atol=1.0, rtol=0.0)
    # A robot that was never trained on has its own share from nobody, and is scored by its text.
    unseen_BR = selector(robots_RC[:1], robots_RC[:2], ("Boat", "Ship"))
    assert unseen_BR[0, 0] > unseen_BR[0, 1] + 0.5
