"""Generation against plain references: loops without a cache, and search through everything."""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bitgen.config import BitGenConfig
from bitgen.errors import InputError
from bitgen.inference import generate as generation
from bitgen.inference.generate import Generation, generate
from bitgen.model.bitgen import BitGenModel

BOS, EOS, NEVER = 1, 2, (0, 1, 3, 4)
WORDS = 3
"""Ordinary tokens of the toy vocabulary: ids 5, 6 and 7; rows above stand for nothing."""
USED_VOCABULARY = 5 + WORDS
PROMPTS = [[BOS], [BOS, 5, 6, 7], [BOS, 6]]
EXPERTS = {"num_experts": 4, "experts_per_token": 2}
with_and_without_experts = pytest.mark.parametrize(
    "experts", [{}, EXPERTS], ids=["dense", "experts"]
)


def toy_model(seed: int = 0, **changes: Any) -> BitGenModel:
    torch.manual_seed(seed)
    values = {
        "vocab_size": 11, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 8, "intermediate_size": 32, "max_positions": 32, "image_size": 16,
        "patch_size": 8, "encoder_hidden_size": 16, "encoder_layers": 1, "encoder_heads": 2,
        "encoder_intermediate_size": 16,
    }  # fmt: skip
    model = BitGenModel(BitGenConfig(**{**values, **changes}))
    with torch.no_grad():  # far from uniform, so that no two tokens are nearly tied
        model.text_decoder.embed_tokens.weight.normal_(std=0.35)
        for name, parameter in model.named_parameters():
            if name.endswith("sub_norm.weight"):
                parameter.fill_(1.0)
    return model.eval()


def toy_images(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def run(model: BitGenModel, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
    options.setdefault("images", toy_images(len(prompts)))
    options.setdefault("max_tokens", 8)
    return generate(
        model,
        prompt_ids=prompts,
        eos_id=EOS,
        never_ids=NEVER,
        vocab_size=USED_VOCABULARY,
        **options,
    )


@torch.inference_mode()
def next_log_probabilities(
    model: BitGenModel, image: torch.Tensor | None, prompt: Sequence[int], tokens: Sequence[int]
) -> torch.Tensor:
    """Float64 `[V]`, from one row without padding and without a cache."""
    ids_1L = torch.tensor([[*prompt, *tokens]])
    mask = model.build_attention_mask(
        torch.ones_like(ids_1L), torch.tensor([len(prompt)]), has_images=image is not None
    )
    images = None if image is None else image.unsqueeze(0)
    logits = model(ids_1L, images=images, attention_mask=mask).logits[0, -1]
    return logits.double().log_softmax(dim=-1)


def sequence_log_probability(
    model: BitGenModel, image: torch.Tensor | None, prompt: Sequence[int], tokens: Sequence[int]
) -> float:
    return sum(
        float(next_log_probabilities(model, image, prompt, tokens[:position])[token])
        for position, token in enumerate(tokens)
    )


def greedy_reference(
    model: BitGenModel, image: torch.Tensor | None, prompt: Sequence[int], max_tokens: int
) -> tuple[list[int], float]:
    tokens: list[int] = []
    total = 0.0
    while len(tokens) < max_tokens:
        log_probabilities = next_log_probabilities(model, image, prompt, tokens)
        chosen = max([EOS, *range(5, USED_VOCABULARY)], key=lambda i: float(log_probabilities[i]))
        total += float(log_probabilities[chosen])
        if chosen == EOS:
            break
        tokens.append(chosen)
    return tokens, total


# Greedy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "ternary"])
@pytest.mark.parametrize("mode", ["prefix", "causal"])
@pytest.mark.parametrize("with_images", [True, False])
@with_and_without_experts
def test_greedy_with_cache_and_padding_equals_a_loop_without(
    quantization: str, mode: str, with_images: bool, experts: dict[str, int]
) -> None:
    # A last bit of float that differs can round an int8 activation the other way.
    tolerance = 1e-4 if quantization == "none" else 0.05
    ended = set()
    for seed in range(4, 10):
        model = toy_model(seed, quantization=quantization, attention_mode=mode, **experts)
        images = toy_images(len(PROMPTS), seed) if with_images else None
        generations = run(model, PROMPTS, images=images)
        for row, (prompt, got) in enumerate(zip(PROMPTS, generations, strict=True)):
            image = None if images is None else images[row]
            tokens, log_probability = greedy_reference(model, image, prompt, 8)
            assert got.tokens == tokens
            assert got.log_probability == pytest.approx(log_probability, abs=tolerance)
            assert got.finished == (len(tokens) < 8)
            ended.add(got.finished)
    assert ended == {True, False}, "the toy models should end some rows and not others"


def test_the_picture_changes_what_is_said() -> None:
    model = toy_model(3)
    said = {tuple(g.tokens) for g in run(model, [[BOS]] * 8, images=toy_images(8))}
    assert len(said) > 1


@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3, "top_p": 0.9}],
)
@with_and_without_experts
def test_a_batch_answers_as_each_row_alone(
    options: dict[str, Any], experts: dict[str, int]
) -> None:
    model = toy_model(1, quantization="none", **experts)
    images = toy_images(len(PROMPTS))
    rows = range(len(PROMPTS))
    together = run(model, PROMPTS, images=images, seeds=rows, **options)
    for row in rows:
        (alone,) = run(model, [PROMPTS[row]], images=images[row : row + 1], seeds=[row], **options)
        assert alone.tokens == together[row].tokens
        assert alone.log_probability == pytest.approx(together[row].log_probability, abs=1e-4)


def test_special_tokens_and_unused_rows_are_never_generated() -> None:
    model = toy_model(2)
    with torch.no_grad():  # the end of text becomes unlikely, all that is forbidden likely
        embedding = model.text_decoder.embed_tokens.weight
        embedding[[0, 1, 3, 4, 8, 9, 10]] *= 4
    for options in ({}, {"beam_size": 4}, {"temperature": 3.0}):
        for got in run(model, PROMPTS, max_tokens=12, **options):
            assert set(got.tokens) <= {5, 6, 7}
    # Without the ban they do appear: the test above can fail.
    free = generate(model, toy_images(3), PROMPTS, EOS, 12, temperature=3.0, seeds=range(3))
    assert any(set(got.tokens) & {0, 1, 3, 4, 8, 9, 10} for got in free)


def test_it_stops_when_all_rows_have_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        model = toy_model(seed)
        lengths = [len(g.tokens) + g.finished for g in run(model, PROMPTS, max_tokens=12)]
        if 2 < max(lengths) < 12 and min(lengths) < max(lengths):
            break
    else:
        pytest.fail("no toy model ends its rows at different steps")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    run(model, PROMPTS, max_tokens=12)
    assert len(calls) == max(lengths)  # the prompt, and each token but the last


def test_training_mode_is_left_as_it_was_and_not_used() -> None:
    model = toy_model(0, dropout=0.5)
    expected = run(model, PROMPTS)
    model.train()
    assert run(model, PROMPTS) == expected
    assert model.training


def test_nothing_to_do() -> None:
    assert run(toy_model(), [], images=None) == []


# Sampling ---------------------------------------------------------------------------------------


def draw(
    logits: Sequence[float], count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1
) -> Counter[int]:
    rows = torch.tensor([logits]).expand(count, -1)
    uniform = torch.from_numpy(generation._uniform_numbers(range(count), 1, 1))
    sampler = generation._Sampler(temperature, top_k, top_p, uniform)
    return Counter(sampler(rows).tolist())


LOGITS = [1.0, 3.0, -1.0, 2.0, float("-inf"), 2.5]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_frequencies_are_the_softmax(temperature: float) -> None:
    count = 4000
    drawn = draw(LOGITS, count, temperature)
    expected = (torch.tensor(LOGITS, dtype=torch.float64) / temperature).softmax(dim=0)
    assert drawn[4] == 0
    for token, probability in enumerate(expected.tolist()):
        spread = (probability * (1 - probability) / count) ** 0.5
        assert abs(drawn[token] / count - probability) <= 4.5 * spread


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    assert set(draw(LOGITS, 500, top_k=3)) == {1, 5, 3}
    assert set(draw(LOGITS, 500, top_k=1)) == {1}
    # Softmax in falling order: 0.459, 0.279, 0.169, 0.062, ...
    assert set(draw(LOGITS, 500, top_p=0.45)) == {1}
    assert set(draw(LOGITS, 500, top_p=0.5)) == {1, 5}
    assert set(draw(LOGITS, 500, top_p=0.8)) == {1, 5, 3}
    assert set(draw(LOGITS, 500, top_k=2, top_p=0.99)) == {1, 5}
    assert set(draw(LOGITS, 2000, top_k=99, top_p=1.0)) == {0, 1, 2, 3, 5}


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 5.0, float("-inf")]])
    sampler = generation._Sampler(1.0, 0, 1.0, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert [sampler(logits).item(), sampler(logits).item()] == [1, 2]


def test_a_tiny_temperature_is_greedy() -> None:
    model = toy_model(1)
    greedy = run(model, PROMPTS)
    assert [g.tokens for g in run(model, PROMPTS, temperature=1e-6)] == [g.tokens for g in greedy]
    assert [g.tokens for g in run(model, PROMPTS, temperature=9.0, top_k=1)] == [
        g.tokens for g in greedy
    ]


def test_sampling_repeats_by_seed_and_differs_otherwise() -> None:
    model = toy_model(0)

    def sample(seed: int) -> list[list[int]]:
        drawn = run(model, PROMPTS, temperature=2.0, seeds=[seed] * len(PROMPTS))
        return [g.tokens for g in drawn]

    assert sample(7) == sample(7)
    assert len({str(sample(seed)) for seed in range(6)}) > 3
    # Without seeds, torch's own decides.
    torch.manual_seed(5)
    first = run(model, PROMPTS, temperature=2.0)
    assert run(model, PROMPTS, temperature=2.0) != first
    torch.manual_seed(5)
    assert run(model, PROMPTS, temperature=2.0) == first


def test_a_longer_limit_does_not_change_the_draws_before_it() -> None:
    model = toy_model(0)

    def sample(max_tokens: int) -> list[int]:
        (got,) = run(model, [[BOS]], max_tokens=max_tokens, temperature=2.0, seeds=[3])
        return got.tokens

    longest = sample(20)
    for limit in (1, 3, 7):
        assert sample(limit) == longest[:limit]


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.8}])
def test_samples_of_a_prompt_are_spread_evenly(cut: dict[str, Any]) -> None:
    """Of S samples, S times its probability say a token, to within one; so do pairs of tokens."""
    model, temperature, num_samples = toy_model(3, quantization="none"), 1.3, 200
    images = toy_images(1)
    for seed in range(3):
        drawn = run(
            model, [PROMPTS[0]], images=images, max_tokens=2, temperature=temperature,
            seeds=[seed], num_samples=num_samples, **cut,
        )  # fmt: skip
        said = [tuple([*got.tokens, EOS][:2]) for got in drawn]
        first = drawn_probabilities(model, images[0], PROMPTS[0], [], temperature, **cut)
        counts = Counter(tokens[0] for tokens in said)
        for token, probability in enumerate(first.tolist()):
            assert abs(counts[token] - num_samples * probability) < 1 + 1e-3
            if token == EOS or probability == 0:
                continue
            second = drawn_probabilities(model, images[0], PROMPTS[0], [token], temperature, **cut)
            pairs = Counter(tokens[1] for tokens in said if tokens[0] == token)
            for other, its_probability in enumerate(second.tolist()):
                expected = num_samples * probability * its_probability
                assert abs(pairs[other] - expected) < 1 + 1e-3


def drawn_probabilities(
    model: BitGenModel, image: torch.Tensor, prompt: Sequence[int], tokens: Sequence[int],
    temperature: float, top_k: int = 0, top_p: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Float64 `[V]`: how likely each token is to be drawn next."""
    logits = next_log_probabilities(model, image, prompt, tokens) / temperature
    logits[[*NEVER, *range(USED_VOCABULARY, len(logits))]] = -torch.inf
    probability = logits.softmax(dim=0)
    order = probability.argsort(descending=True)
    if top_k:
        probability[order[top_k:]] = 0
        probability /= probability.sum()
    before = probability[order].cumsum(dim=0) - probability[order]
    probability[order[before >= top_p]] = 0
    return probability / probability.sum()


@with_and_without_experts
def test_samples_are_those_of_each_prompt_alone_with_the_models_log_probability(
    experts: dict[str, int],
) -> None:
    model = toy_model(1, quantization="none", **experts)
    images, rows = toy_images(len(PROMPTS)), range(len(PROMPTS))
    options = {"temperature": 1.5, "num_samples": 5}
    together = run(model, PROMPTS, images=images, seeds=rows, **options)
    assert len(together) == 5 * len(PROMPTS)
    for row in rows:
        alone = run(model, [PROMPTS[row]], images=images[row : row + 1], seeds=[row], **options)
        for got, one in zip(together[5 * row : 5 * row + 5], alone, strict=True):
            assert got.tokens == one.tokens
            tokens = [*got.tokens, EOS] if got.finished else got.tokens
            expected = sequence_log_probability(model, images[row], PROMPTS[row], tokens)
            assert got.log_probability == pytest.approx(expected, abs=1e-4)


def test_samples_go_on_differing_when_the_interval_is_used_up() -> None:
    drawn = generate(
        toy_model(0), None, [[BOS]], EOS, 28, temperature=30.0, never_ids=[EOS], num_samples=64,
        seeds=[2],
    )  # fmt: skip
    assert len({tuple(got.tokens[18:]) for got in drawn}) == 64


def test_samples_that_cannot_be_drawn_are_refused() -> None:
    for options in ({"num_samples": 0, "temperature": 1.0}, {"num_samples": 2}):
        with pytest.raises(ValueError, match="samples cannot be drawn"):
            run(toy_model(), PROMPTS, **options)


def test_log_probability_is_the_models_own_whatever_chose_the_tokens() -> None:
    model = toy_model(4, quantization="none")
    images = toy_images(len(PROMPTS))
    for options in ({"temperature": 2.0, "top_k": 3}, {"beam_size": 3}):
        for row, got in enumerate(run(model, PROMPTS, images=images, **options)):
            tokens = [*got.tokens, EOS] if got.finished else got.tokens
            expected = sequence_log_probability(model, images[row], PROMPTS[row], tokens)
            assert got.log_probability == pytest.approx(expected, abs=1e-4)


# Beam search ------------------------------------------------------------------------------------

# References of different penalties and beams ask one model for the same words again and again.


@functools.cache
def beam_model(seed: int, with_experts: bool = False) -> BitGenModel:
    return toy_model(seed, quantization="none", **(EXPERTS if with_experts else {}))


@functools.cache
def foretold(seed: int, with_experts: bool, row: int, tokens: tuple[int, ...]) -> tuple[float, ...]:
    """Log-probabilities of each token after `tokens`, with a row of `PROMPTS` and its picture."""
    image = toy_images(len(PROMPTS), seed)[row]
    model = beam_model(seed, with_experts)
    return tuple(next_log_probabilities(model, image, PROMPTS[row], tokens).tolist())


def all_sequences(max_tokens: int) -> list[list[int]]:
    """Everything that can be generated: ended by EOS, or cut off at `max_tokens`."""
    words = range(5, USED_VOCABULARY)
    ended = [
        [*sequence, EOS]
        for length in range(max_tokens)
        for sequence in itertools.product(words, repeat=length)
    ]
    return ended + [list(sequence) for sequence in itertools.product(words, repeat=max_tokens)]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.5])
def test_a_wide_beam_finds_the_best_of_all_sequences(length_penalty: float) -> None:
    max_tokens = 3
    sequences = all_sequences(max_tokens)
    lengths = set()
    for seed in range(10):
        generations = run(
            beam_model(seed),
            PROMPTS,
            images=toy_images(len(PROMPTS), seed),
            max_tokens=max_tokens,
            beam_size=len(sequences),
            length_penalty=length_penalty,
        )
        for row, got in enumerate(generations):
            scores = []
            for sequence in sequences:
                total = sum(
                    foretold(seed, False, row, tuple(sequence[:position]))[token]
                    for position, token in enumerate(sequence)
                )
                scores.append((total / len(sequence) ** length_penalty, sequence, total))
            _, best, log_probability = max(scores)
            assert got.tokens == [token for token in best if token != EOS]
            assert got.finished == (best[-1] == EOS)
            assert got.log_probability == pytest.approx(log_probability, abs=1e-4)
            lengths.add(len(best))
    assert len(lengths) > 1 or abs(length_penalty) > 0.5


def beam_reference(
    seed: int,
    with_experts: bool,
    row: int,
    max_tokens: int,
    beam_size: int,
    length_penalty: float,
) -> tuple[list[int], float]:
    """Beam search in lists, one hypothesis at a time, without a cache or an early way out."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, float, list[int]]] = []
    for step in range(1, max_tokens + 1):
        continuations = []
        for total, tokens in running:
            log_probabilities = foretold(seed, with_experts, row, tuple(tokens))
            for token in [EOS, *range(5, USED_VOCABULARY)]:
                continuations.append((total + log_probabilities[token], [*tokens, token]))
        continuations.sort(key=lambda entry: -entry[0])
        for total, tokens in continuations[:beam_size]:
            if tokens[-1] == EOS:
                finished.append((total / step**length_penalty, total, tokens[:-1]))
        running = [entry for entry in continuations if entry[1][-1] != EOS][:beam_size]
        if step == max_tokens:
            finished += [(total / step**length_penalty, total, t) for total, t in running]
        elif len(finished) >= beam_size:
            break
    _, total, tokens = max(finished)
    return tokens, total


@pytest.mark.parametrize("beam_size", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("with_experts", [False, True], ids=["dense", "experts"])
def test_beam_search_equals_one_written_in_lists(
    beam_size: int, length_penalty: float, with_experts: bool
) -> None:
    differs_from_greedy = False
    for seed in range(6):
        model, images = beam_model(seed, with_experts), toy_images(len(PROMPTS), seed)
        generations = run(
            model, PROMPTS, images=images, beam_size=beam_size, length_penalty=length_penalty
        )
        greedy = run(model, PROMPTS, images=images)
        for row, got in enumerate(generations):
            tokens, total = beam_reference(seed, with_experts, row, 8, beam_size, length_penalty)
            assert got.tokens == tokens
            assert got.log_probability == pytest.approx(total, abs=1e-4)
            differs_from_greedy |= got.tokens != greedy[row].tokens
    assert differs_from_greedy


def test_a_beam_of_one_is_greedy() -> None:
    with torch.inference_mode():
        for seed in range(6):
            model = toy_model(seed, quantization="none")
            images = toy_images(len(PROMPTS), seed)
            never_V = generation._never_mask(model, NEVER, USED_VOCABULARY)
            read, cache = generation.read_prompts(model, images, PROMPTS, 8, attention_window=0)
            logits_BV = read.logits[:, -1].float()
            beams = generation._beam_search(
                generation.EagerDecoder(model, cache), logits_BV, never_V, EOS, 8, 1, 1.0
            )
            greedy = run(model, PROMPTS, images=images)
            assert [(g.tokens, g.finished) for g in beams] == [
                (g.tokens, g.finished) for g in greedy
            ]
            assert [g.log_probability for g in beams] == pytest.approx(
                [g.log_probability for g in greedy], abs=1e-4
            )


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.5])
@pytest.mark.parametrize("running", [-0.5, -3.0, -7.0])
def test_a_row_is_closed_just_when_nothing_can_beat_its_best(
    length_penalty: float, running: float
) -> None:
    length, max_tokens = 3, 9
    reachable = max(running / m**length_penalty for m in range(length + 1, max_tokens + 1))
    for margin, closed in ((-0.01, False), (0.01, True)):
        best = generation._BestHypotheses(1, max_tokens, EOS, length_penalty, torch.device("cpu"))
        log_probability_B = torch.tensor([(reachable + margin) * length**length_penalty])
        tokens_BT = torch.full((1, max_tokens), EOS)
        best.offer(torch.tensor([1]), log_probability_B, tokens_BT, length=length)
        best.close(torch.tensor([running]), length, beam_size=5)
        assert best.done_B.tolist() == [closed]


def test_beam_search_stops_when_all_rows_are_done() -> None:
    for seed in range(20):
        model = toy_model(seed)
        longest = max(len(g.tokens) for g in run(model, PROMPTS, max_tokens=20, beam_size=2))
        if longest < 6:
            break
    else:
        pytest.fail("no toy model ends its beams early")
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    run(model, PROMPTS, max_tokens=20, beam_size=2)
    assert len(calls) < 15


def test_one_token_and_more_beams_than_tokens() -> None:
    model = toy_model(0)
    for got, greedy in zip(
        run(model, PROMPTS, max_tokens=1, beam_size=20), run(model, PROMPTS, max_tokens=1),
        strict=True,
    ):  # fmt: skip
        assert got.tokens == greedy.tokens
        assert got.finished == greedy.finished


# Without end ------------------------------------------------------------------------------------


def windowed_greedy(
    model: BitGenModel, image: torch.Tensor, prompt: Sequence[int], max_tokens: int, window: int
) -> list[int]:
    """One row, each token from a whole forward under the window's mask, without a cache."""
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        ids_1L = torch.tensor([[*prompt, *tokens]])
        mask = model.build_attention_mask(torch.ones_like(ids_1L), torch.tensor([len(prompt)]))
        mask = mask.windowed(window, sinks=model.num_image_tokens + 4)
        with torch.inference_mode():
            logits = model(ids_1L, images=image[None], attention_mask=mask).logits[0, -1]
        chosen = max([EOS, *range(5, USED_VOCABULARY)], key=lambda i: float(logits[i]))
        if chosen == EOS:
            break
        tokens.append(chosen)
    return tokens


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_window_equals_a_loop_under_its_mask(window: int) -> None:
    images = toy_images(len(PROMPTS))
    lengths = set()
    for seed in range(5):
        model = toy_model(seed, quantization="none")
        got = run(model, PROMPTS, images=images, max_tokens=20, attention_window=window)
        for generated, image, prompt in zip(got, images, PROMPTS, strict=True):
            tokens = windowed_greedy(model, image, prompt, 20, window)
            assert generated.tokens == tokens
            lengths.add(len(tokens))
    assert max(lengths) > window + 4  # the window has moved on


@pytest.mark.parametrize("options", [{}, {"beam_size": 2}, {"temperature": 1.0}])
def test_a_window_generates_beyond_the_positions_of_the_model(options: dict[str, Any]) -> None:
    model = toy_model(quantization="none")
    far = 3 * model.config.max_positions
    got = generate(
        model,
        toy_images(len(PROMPTS)),
        PROMPTS,
        eos_id=EOS,
        never_ids=(*NEVER, EOS),
        vocab_size=USED_VOCABULARY,
        max_tokens=far,
        attention_window=8,
        **options,
    )
    for row in got:
        assert len(row.tokens) == far
        assert math.isfinite(row.log_probability)


def test_a_window_that_does_not_fit_is_refused_with_its_range() -> None:
    model = toy_model()
    room = model.config.max_positions - model.num_image_tokens - 4
    run(model, PROMPTS, attention_window=room)
    for window in (room + 1, -1):
        with pytest.raises(InputError, match=f"1 to {room} "):
            run(model, PROMPTS, attention_window=window)


# What is refused --------------------------------------------------------------------------------


def test_a_bidirectional_model_is_asked_for_no_captions() -> None:
    with pytest.raises(InputError, match="bidirectional"):
        run(toy_model(attention_mode="bidirectional"), PROMPTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"beam_size": 0}, "beam_size"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.01}, "top_p"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "beam_size": 2}, "does not sample"),
        ({"top_k": 5}, "temperature 0"),
        ({"top_p": 0.5}, "temperature 0"),
        ({"beam_size": 2, "length_penalty": float("nan")}, "length_penalty"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(toy_model(), PROMPTS, **options)


def test_room_is_used_to_the_last_position_and_not_beyond() -> None:
    model = toy_model(0)
    with torch.no_grad():  # never ends by itself
        model.text_decoder.embed_tokens.weight[EOS] = 0
    prompt = [BOS, 5, 6]
    room = model.config.max_positions - model.num_image_tokens - len(prompt) + 1
    for options in ({}, {"beam_size": 2}):
        (got,) = run(model, [prompt], max_tokens=room, **options)
        assert len(got.tokens) + got.finished <= room
        with pytest.raises(InputError, match=f"room for {room} ") as caught:
            run(model, [prompt], max_tokens=room + 1, **options)
        assert str(room) in str(caught.value.remedy)
    with pytest.raises(InputError, match="prompt is too long"):
        run(model, [[BOS] + [5] * model.config.max_positions], max_tokens=1)
