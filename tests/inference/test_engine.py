"""The native engine against the PyTorch model: the same integers, sums of floats up to rounding.

Where rounding moves an activation over the middle between two int8 numbers, all that follows is off
by up to a hundredth of its size. Narrow models have few such activations, and most of their numbers
must agree up to rounding; in the wide one they are met in every pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from bitgen.config import BitGenConfig
from bitgen.dataset.images import normalize_images
from bitgen.errors import ModelFileError
from bitgen.inference.engine import (
    Engine,
    EngineError,
    EngineGeneration,
    GenerationOptions,
    Generator,
    TokenSequence,
    why_not_native,
)
from bitgen.inference.generate import generate
from bitgen.kernels import library
from bitgen.kernels.tiles import pack_int8_tiles
from bitgen.model.bitgen import BitGenModel
from bitgen.model.ternary import pack_ternary_layers
from tests.model.small_model import ROBOTS, small_config, small_model

STATUS = library.describe()
pytestmark = pytest.mark.skipif(not STATUS.usable, reason=STATUS.reason)

EOS = 2
SELDOM = [token for token in range(50) if token not in (EOS, 20, 21, 22)]
"""Where these are never chosen, many texts end early."""
ODD_WIDTHS: dict[str, Any] = {
    "hidden_size": 44, "num_heads": 3, "num_kv_heads": 1, "head_dim": 14, "intermediate_size": 70,
    "vocab_size": 333, "encoder_hidden_size": 36, "encoder_heads": 3,
    "encoder_intermediate_size": 52, "image_size": 48,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "causal": {"attention_mode": "causal"},
    "odd widths": ODD_WIDTHS,
    "2 of 4 experts": {"num_experts": 4, "experts_per_token": 2},
    "1 of 3 experts": {"num_experts": 3},
    "residual stem": {"stem_residual_convolutions": 2},
    "wide": {
        "hidden_size": 256, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64, "vocab_size": 700,
        "intermediate_size": 512, "patch_size": 8, "encoder_layers": 2, "max_positions": 200,
    },
}  # fmt: skip


@pytest.fixture(params=STATUS.usable_kernels)
def each_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this processor has, one after the other."""
    library.select_kernels(request.param)
    yield request.param
    library.select_kernels(None)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = library.threads()
    yield library.set_threads
    library.set_threads(before)


def packed_model(**changes: Any) -> BitGenModel:
    """A model with random weights, ternary and packed, and random statistics of its stem."""
    model = small_model(**{"quantization": "ternary", **changes})
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2, generator=generator)
    with torch.no_grad():
        model.robot_selector.robot_bias.copy_(torch.tensor([0.5, -0.25]))
        model.robot_selector.shared_bias.fill_(0.125)
    pack_ternary_layers(model)
    return model.eval()


def tensors_of(model: BitGenModel) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def engine_of(model: BitGenModel) -> Engine:
    return Engine(model.config, tensors_of(model))


def pictures(model: BitGenModel, count: int) -> tuple[np.ndarray, torch.Tensor]:
    size = model.config.image_size
    pixels = np.random.default_rng(5).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    mean, std = model.config.image_mean, model.config.image_std
    return pixels, normalize_images(torch.from_numpy(pixels), mean, std)


def random_prompts(model: BitGenModel, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, model.config.vocab_size, n).tolist() for n in lengths]


def assert_close(
    got: np.ndarray | None, want: torch.Tensor | np.ndarray, is_wide: bool = False
) -> None:
    assert got is not None
    want = np.asarray(want)
    assert got.shape == want.shape
    difference = np.abs(got - want) / np.abs(want).max()
    assert difference.max() < 0.03
    assert np.median(difference) < (0.006 if is_wide else 1e-5)


@torch.inference_mode()
def torch_logits(
    model: BitGenModel, ids: Sequence[int], image: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[L, V]` and states `[L, C]` of one row by itself, all of it prefix."""
    valid = torch.ones(1, len(ids), dtype=torch.bool)
    mask = model.build_attention_mask(
        valid, prefix_lengths_B=torch.tensor([len(ids)]), has_images=image is not None
    )
    output = model(
        torch.tensor([list(ids)]),
        images=None if image is None else image[None],
        attention_mask=mask,
    )
    return output.logits[0], output.states[0]


# Against PyTorch --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_image_tokens_equal_those_of_the_model(changes: dict[str, Any], each_path: str) -> None:
    model = packed_model(**changes)
    engine = engine_of(model)
    pixels, images = pictures(model, 19)  # more than are encoded at a time
    with torch.inference_mode():
        want = model.encode_images(images)
    for count in (1, 2, 19):
        assert_close(engine.encode_images(pixels[:count]), want[:count])
    assert engine.encode_images(pixels[:0]).shape == (0, *want.shape[1:])


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_logits_and_states_of_ragged_rows_equal_those_of_each_alone(
    changes: dict[str, Any], each_path: str
) -> None:
    model = packed_model(**changes)
    engine = engine_of(model)
    _, images = pictures(model, 4)
    prompts = random_prompts(model, [1, 2, 17, 30])
    with torch.inference_mode():
        image_tokens = model.encode_images(images).numpy()
    rows = [engine.prompt(ids, t) for ids, t in zip(prompts, image_tokens, strict=True)]
    rows += [engine.prompt(ids) for ids in prompts]
    output = engine.forward(rows, all_logits=True, return_states=True, return_pooled=True)
    last = engine.forward(rows).logits
    assert output.logits is not None and output.states is not None and last is not None
    end = 0
    for index, row in enumerate(rows):
        end += len(row.ids)
        ids = prompts[index % 4]
        want, states = torch_logits(model, ids, images[index] if index < 4 else None)
        is_wide = changes is MODELS["wide"]
        assert_close(output.logits[end - len(ids) : end], want, is_wide)
        assert_close(output.states[end - len(ids) : end], states, is_wide)
        assert np.array_equal(last[index], output.logits[end - 1])


def test_a_row_may_be_prefix_causal_or_in_between(each_path: str) -> None:
    model = packed_model()
    engine = engine_of(model)
    (ids,) = random_prompts(model, [23])
    for prefix in (0, 1, 9, 23, 40):
        output = engine.forward([TokenSequence(ids, prefix=prefix)], all_logits=True)
        with torch.inference_mode():
            mask = model.build_attention_mask(
                torch.ones(1, 23, dtype=torch.bool),
                prefix_lengths_B=torch.tensor([min(prefix, 23)]),
                has_images=False,
            )
            want = model(torch.tensor([ids]), attention_mask=mask).logits[0]
        assert_close(output.logits, want)


@pytest.mark.parametrize("mode", ["prefix", "causal", "bidirectional"])
def test_robots_are_scored_as_by_the_model(mode: str, each_path: str) -> None:
    model = packed_model(attention_mode=mode)
    engine = engine_of(model)
    pixels, images = pictures(model, 2)
    robots = [[4, 20, 21, 22], [4, 23], [4, 30, 31]]  # of small_model
    names = [*ROBOTS, "Newcomer"]
    tasks = random_prompts(model, [3, 12])
    tokens = engine.encode_images(pixels)
    states = engine.encode_robots(robots)
    with torch.inference_mode():
        model.set_robots(
            names,
            torch.tensor([[4, 20, 21, 22], [4, 23, 0, 0], [4, 30, 31, 0]]),
            torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        )
        assert_close(states, model.encode_robots())
        for row, ids in enumerate(tasks):
            for image in (None, images[row]):
                output = model(
                    torch.tensor([ids]),
                    images=None if image is None else image[None],
                    attention_mask=model.build_attention_mask(
                        torch.ones(1, len(ids)),
                        prefix_lengths_B=torch.tensor([len(ids)]),
                        has_images=image is not None,
                    ),
                    return_robot_selection=True,
                )
                given = [None if image is None else tokens[row]]
                logits = engine.robot_logits([ids], given, states, names)
                assert_close(logits, output.robot_logits)


def assert_same_generations(
    got: Sequence[EngineGeneration], model: BitGenModel, *arguments: Any, **options: Any
) -> None:
    for ours, theirs in zip(got, generate(model, *arguments, **options), strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.finished == theirs.finished
        assert ours.log_probability == pytest.approx(theirs.log_probability, abs=0.05)


NARROW = {name: changes for name, changes in MODELS.items() if name != "wide"}
"""The wide one's random logits lie closer together than int8 numbers."""


@pytest.mark.parametrize("changes", NARROW.values(), ids=NARROW.keys())
@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_greedy_and_beam_search_choose_the_models_tokens(
    changes: dict[str, Any], beam_size: int
) -> None:
    model = packed_model(**changes)
    engine = engine_of(model)
    pixels, images = pictures(model, 3)
    prompts = random_prompts(model, [1, 4, 9])
    options: dict[str, Any] = {
        "eos_id": EOS, "max_tokens": 15, "beam_size": beam_size, "length_penalty": 0.7,
        "never_ids": (0, 1, 3), "vocab_size": model.config.vocab_size - 5,
    }  # fmt: skip
    for tokens, given in ((list(engine.encode_images(pixels)), images), (None, None)):
        found = engine.generate(prompts, tokens, GenerationOptions(**options))
        assert_same_generations(found, model, given, prompts, **options)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("max_tokens", [1, 2, 12])
def test_beam_search_follows_the_same_rules_where_texts_end(
    length_penalty: float, max_tokens: int
) -> None:
    model = packed_model()
    engine = engine_of(model)
    prompts = random_prompts(model, [1, 2, 3, 4, 5, 6, 7, 8])
    lengths = set()
    for beam_size in (1, 3, 7):
        options: dict[str, Any] = {
            "eos_id": EOS, "max_tokens": max_tokens, "beam_size": beam_size,
            "length_penalty": length_penalty, "never_ids": SELDOM,
        }  # fmt: skip
        found = engine.generate(prompts, None, GenerationOptions(**options))
        assert_same_generations(found, model, None, prompts, **options)
        lengths |= {(len(generation.tokens), generation.finished) for generation in found}
    assert len(lengths) > 1 or max_tokens == 1


# Sampling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 7, "top_p": 0.5}, {"top_p": 0.999}]
)
def test_samples_follow_the_models_distribution(cut: dict[str, Any]) -> None:
    model = packed_model()
    engine = engine_of(model)
    ids, temperature, draws = [5, 9, 11], 0.8, 3000
    options = GenerationOptions(
        eos_id=EOS, max_tokens=1, temperature=temperature, never_ids=(7, EOS), rows=64, **cut
    )
    found = engine.generate([ids] * draws, None, options, seeds=range(draws))
    counts = np.bincount([g.tokens[0] for g in found], minlength=50)

    logits = torch_logits(model, ids, None)[0][-1].double()
    logits[[7, EOS]] = -torch.inf
    order = logits.argsort(descending=True)
    order = order[: cut.get("top_k") or len(order)]
    probability = torch.softmax(logits[order] / temperature, dim=0)
    before = probability.cumsum(0) - probability
    probability[before >= cut.get("top_p", 1.0)] = 0
    expected = np.zeros(50)
    expected[order.numpy()] = (probability / probability.sum()).numpy() * draws
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    deviation = np.abs(counts - expected)[kept] / np.sqrt(expected[kept] + 1)
    assert deviation.max() < 4.5


def test_a_seed_decides_the_draws_whatever_stands_beside() -> None:
    engine = engine_of(packed_model())
    options = GenerationOptions(eos_id=EOS, max_tokens=20, temperature=1.5)
    prompts = random_prompts(packed_model(), [3, 3, 5])
    alone = [engine.generate([p], None, options, [9])[0] for p in prompts]
    assert engine.generate(prompts, None, options, [9, 9, 9]) == alone
    assert engine.generate(prompts, None, options, [1, 2, 3]) != alone
    assert engine.generate(prompts, None, options) != engine.generate(prompts, None, options)


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.8}])
def test_samples_of_a_prompt_are_spread_evenly(cut: dict[str, Any]) -> None:
    """Of S samples, S times its probability say a token, to within one; so do pairs of tokens."""
    model = packed_model(attention_mode="causal")
    engine = engine_of(model)
    ids, temperature, num_samples = [5, 9, 11], 0.8, 300
    options = GenerationOptions(
        eos_id=EOS, max_tokens=2, temperature=temperature, never_ids=(7,), num_samples=num_samples,
        **cut,
    )  # fmt: skip

    def probabilities(tokens: list[int]) -> np.ndarray:
        logits = torch_logits(model, [*ids, *tokens], None)[0][-1].double() / temperature
        logits[7] = -torch.inf
        order = logits.argsort(descending=True)[: cut.get("top_k") or len(logits)]
        kept = torch.softmax(logits[order], dim=0)
        kept[kept.cumsum(0) - kept >= cut.get("top_p", 1.0)] = 0
        found = np.zeros(len(logits))
        found[order.numpy()] = (kept / kept.sum()).numpy()
        return found

    first = probabilities([])
    for seed in range(3):
        drawn = engine.generate([ids], None, options, seeds=[seed])
        said = [tuple([*got.tokens, EOS][:2]) for got in drawn]
        counts = np.bincount([tokens[0] for tokens in said], minlength=50)
        assert np.abs(counts - num_samples * first).max() < 1.05  # roundings of sums
        for token in counts.argsort()[-3:].tolist():
            if token == EOS:
                continue
            pairs = np.bincount([t[1] for t in said if t[0] == token], minlength=50)
            expected = num_samples * first[token] * probabilities([token])
            assert np.abs(pairs - expected).max() < 1.05


def test_samples_of_several_prompts_are_those_of_each_alone() -> None:
    """Whatever is read as one meanwhile; and each has the log-probability of its own tokens."""
    model = packed_model(attention_mode="causal")
    engine = engine_of(model)
    prompts = random_prompts(model, [3, 3, 5])
    options = GenerationOptions(EOS, 12, temperature=0.7, num_samples=9, rows=2)
    together = engine.generate(prompts, None, options, [4, 5, 6])
    assert len(together) == 27
    for row, prompt in enumerate(prompts):
        alone = engine.generate([prompt], None, options, [4 + row])
        assert [got.tokens for got in alone] == [
            got.tokens for got in together[9 * row : 9 * row + 9]
        ]
        assert len({tuple(got.tokens) for got in alone}) > 1
        for got in alone:
            tokens = [*got.tokens, EOS] if got.finished else got.tokens
            logits = torch_logits(model, [*prompt, *tokens[:-1]], None)[0].double()
            scored = torch.log_softmax(logits, dim=-1)[-len(tokens) :]
            expected = scored[range(len(tokens)), tokens].sum().item()
            assert got.log_probability == pytest.approx(expected, abs=0.05)


def test_samples_go_on_differing_when_the_interval_is_used_up() -> None:
    engine = engine_of(packed_model())
    options = GenerationOptions(EOS, 40, temperature=30.0, never_ids=(EOS,), num_samples=64)
    drawn = engine.generate([[3, 4]], None, options, [2])
    assert all(len(got.tokens) == 40 for got in drawn)
    assert len({tuple(got.tokens[30:]) for got in drawn}) == 64


def test_a_tiny_temperature_is_greedy() -> None:
    engine = engine_of(packed_model())
    prompts = random_prompts(packed_model(), [3, 5])
    greedy = engine.generate(prompts, None, GenerationOptions(EOS, 12))
    for temperature in (1e-4, 1e-40):
        options = GenerationOptions(EOS, 12, temperature=temperature)
        assert engine.generate(prompts, None, options, [1, 2]) == greedy


@pytest.mark.parametrize(
    "options",
    [{}, {"beam_size": 3}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3},
     {"temperature": 1.0, "top_p": 0.5}],
)  # fmt: skip
def test_numbers_that_are_none_crash_nothing(options: dict[str, Any]) -> None:
    model = packed_model()
    engine = engine_of(model)
    image_tokens = np.full((4, 32), np.nan, np.float32)
    options = {"eos_id": EOS, "max_tokens": 5, **options}
    (found,) = engine.generate([[3, 4]], [image_tokens], GenerationOptions(**options), [1])
    assert len(found.tokens) <= 5


# The engine against itself ----------------------------------------------------------------------


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_step_by_step_is_all_at_once(changes: dict[str, Any], each_path: str) -> None:
    model = packed_model(**changes)
    engine = engine_of(model)
    (ids,) = random_prompts(model, [21])
    want = engine.forward([TokenSequence(ids, prefix=5)], all_logits=True).logits
    cache = engine.new_cache(40)
    slots = np.random.default_rng(0).permutation(40)[:21]
    found, past = [], 0
    for count in (5, 1, 1, 3, 4, 7):
        step = TokenSequence(
            ids[past : past + count], None, 5, past=past, slots=slots[: past + count]
        )
        found.append(engine.forward([step], cache, all_logits=True).logits)
        past += count
    assert want is not None
    assert_close(np.concatenate(found), want, changes is MODELS["wide"])


def test_rows_share_what_they_have_in_common() -> None:
    model = packed_model()
    engine = engine_of(model)
    prompt, first, second = random_prompts(model, [6, 2, 2])
    cache = engine.new_cache(20)
    engine.forward([TokenSequence(prompt, slots=range(6))], cache)
    rows = [
        TokenSequence(first, past=6, slots=[*range(6), 10, 11]),
        TokenSequence(second, past=6, slots=[*range(6), 7, 15]),
    ]
    got = engine.forward(rows, cache).logits
    want = engine.forward([TokenSequence(prompt + tail) for tail in (first, second)]).logits
    assert want is not None
    assert_close(got, want)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_threads_and_neighbours_change_no_bit(
    changes: dict[str, Any], set_threads: Callable[[int], None]
) -> None:
    model = packed_model(**changes)
    engine = engine_of(model)
    pixels, _ = pictures(model, 5)
    prompts = random_prompts(model, [1, 2, 3, 9, 19, 33, 6])

    def compute() -> list[np.ndarray]:
        tokens = engine.encode_images(pixels)
        rows = [engine.prompt(ids, tokens[i % 5]) for i, ids in enumerate(prompts)]
        output = engine.forward(rows, return_pooled=True)
        alone = [engine.forward([row], return_pooled=True) for row in rows]
        singles = [engine.encode_images(picture[None]) for picture in pixels]
        assert output.logits is not None and output.pooled is not None
        for index, one in enumerate(alone):
            assert one.logits is not None and one.pooled is not None
            assert np.array_equal(one.logits[0], output.logits[index])
            assert np.array_equal(one.pooled[0], output.pooled[index])
        assert np.array_equal(np.concatenate(singles), tokens)
        robots = engine.encode_robots(prompts)  # more, and fewer, than threads
        scores = engine.robot_logits(prompts[:1], None, robots, ["Newcomer"] * 7)
        return [tokens, output.logits, output.pooled, robots, scores]

    set_threads(1)
    want = compute()
    for threads in (2, 3, 5):
        set_threads(threads)
        for got, expected in zip(compute(), want, strict=True):
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_row_that_ends_makes_room_for_the_next(beam_size: int) -> None:
    model = packed_model()
    engine = engine_of(model)
    prompts = random_prompts(model, [3, 9, 1, 20, 5, 6, 2, 8, 4])
    options = {"eos_id": EOS, "max_tokens": 12, "beam_size": beam_size, "never_ids": SELDOM}
    together = engine.generate(prompts, None, GenerationOptions(**options))
    assert len({len(generation.tokens) for generation in together}) > 1
    for rows in (1, 2, 4):
        options["rows"] = rows
        assert engine.generate(prompts, None, GenerationOptions(**options)) == together


def test_prompts_may_be_added_while_others_are_worked_on() -> None:
    model = packed_model()
    engine = engine_of(model)
    prompts = random_prompts(model, [3, 4, 5, 6, 7, 8])
    options = GenerationOptions(EOS, 8, rows=2)
    want = engine.generate(prompts, None, options)
    generator = Generator(engine, options)
    generator.add(prompts[0])
    adding = threading.Thread(target=lambda: [generator.add(ids) for ids in prompts[1:]])
    adding.start()
    found = dict(generator)
    adding.join()
    found |= dict(generator)
    assert [found[row] for row in range(6)] == want


def test_threads_may_share_an_engine() -> None:
    model = packed_model()
    engine = engine_of(model)
    pixels, _ = pictures(model, 3)
    prompts = random_prompts(model, [3, 4, 5])
    options = GenerationOptions(EOS, 10)
    tokens, want = engine.encode_images(pixels), engine.generate(prompts, None, options)
    failures: list[str] = []

    def work() -> None:
        for _ in range(5):
            if engine.generate(prompts, None, options) != want:
                failures.append("generate")
            if not np.array_equal(engine.encode_images(pixels), tokens):
                failures.append("encode_images")

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []


def test_an_int8_embedding_gives_the_integers_of_its_tiles(each_path: str) -> None:
    model = packed_model(vocab_size=601, hidden_size=64)
    tensors = tensors_of(model)
    embedding = tensors.pop("text_decoder.embed_tokens.weight")
    scales = np.maximum(np.abs(embedding).max(axis=1), 1e-5) / np.float32(127)
    int8 = np.rint(embedding / scales[:, None]).astype(np.int8)
    rounded = int8.astype(np.float32) * scales[:, None]
    floats = Engine(model.config, {**tensors, "text_decoder.embed_tokens.weight": rounded})
    engine = Engine(
        model.config,
        {
            **tensors,
            "text_decoder.embed_tokens.tiles": pack_int8_tiles(int8),
            "text_decoder.embed_tokens.row_scales": scales,
        },
    )
    rows = [TokenSequence(ids) for ids in random_prompts(model, [3, 40])]
    got = engine.forward(rows, all_logits=True, return_states=True)
    want = floats.forward(rows, return_states=True)
    assert got.states is not None and want.states is not None
    assert np.array_equal(got.states, want.states)
    values, token_scales, _ = library.quantize(got.states)
    sums = values[:, :64].astype(np.int32) @ int8.astype(np.int32).T
    logits = sums.astype(np.float32) * (scales / token_scales[:, None])
    assert got.logits is not None
    assert np.array_equal(got.logits, logits)


# What is refused --------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named() -> None:
    model = packed_model()
    tensors = tensors_of(model)
    name = "text_decoder.layers.1.mlp.down_proj.packed"
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.down_proj are missing"):
        Engine(model.config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ModelFileError, match=r"layers\.1\.mlp\.down_proj has \d+ bytes of tiles"):
        Engine(model.config, {**tensors, name: tensors[name][:-1]})
    with pytest.raises(ModelFileError, match=r"text_decoder\.norm\.weight has 31 numbers"):
        Engine(model.config, {**tensors, "text_decoder.norm.weight": np.zeros(31, np.float32)})
    with pytest.raises(ModelFileError, match="ternary"):
        Engine(small_config(), tensors)
    assert why_not_native(model.config) is None
    assert why_not_native(small_config()) is not None
    assert why_not_native(small_config(quantization="ternary", image_encoder="resnet50"))


def test_a_model_with_another_encoder_takes_its_image_tokens() -> None:
    model = packed_model()
    want = engine_of(model).forward([TokenSequence([3, 4])]).logits
    tensors = {k: v for k, v in tensors_of(model).items() if not k.startswith("image_encoder")}
    values = {**model.config.to_dict(), "image_encoder": "resnet18"}
    engine = Engine(BitGenConfig.from_dict(values), tensors)
    assert np.array_equal(engine.forward([TokenSequence([3, 4])]).logits, want)
    with pytest.raises(EngineError, match="no image encoder"):
        engine.encode_images(np.zeros((1, 3, 32, 32), np.uint8))


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (TokenSequence([]), "no new tokens"),
        (TokenSequence([3, 50]), "token 1 is 50"),
        (TokenSequence([3, -1]), "token 1 is -1"),
        (TokenSequence([3, -2], np.zeros((1, 32), np.float32)), "token 1 is -2"),
        (TokenSequence([3] * 65), "64 positions"),
        (TokenSequence([3], past=64, slots=[0] * 65), "64 positions"),
        (TokenSequence([3], past=-1, slots=[]), "below zero"),
        (TokenSequence([3, 4], past=2, prefix=3, slots=range(4)), "prefix"),
        (TokenSequence([3, 4], slots=[0, 8]), "slot 8 of a cache with 8"),
        (TokenSequence([3, 4], slots=[-1, 0]), "slot -1"),
        (TokenSequence([3, 4]), "no slots"),
    ],
)
def test_sequences_out_of_range_are_refused(sequence: TokenSequence, message: str) -> None:
    engine = engine_of(packed_model())
    with pytest.raises(EngineError, match=message):
        engine.forward([TokenSequence([3], slots=[0]), sequence], engine.new_cache(8))


def test_a_past_needs_a_cache_of_this_engine() -> None:
    engine, other = engine_of(packed_model()), engine_of(packed_model())
    with pytest.raises(EngineError, match="no cache"):
        engine.forward([TokenSequence([3], past=1, slots=[0, 1])])
    with pytest.raises(ValueError, match="another engine"):
        engine.forward([TokenSequence([3], slots=[0])], other.new_cache(3))
    with pytest.raises(ValueError, match="2 slots"):
        engine.forward([TokenSequence([3], slots=[0, 1])], engine.new_cache(3))
    with pytest.raises(EngineError, match="slots cannot be made"):
        engine.new_cache(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"beam_size": 0}, "beam_size"),
        ({"rows": 0}, "rows"),
        ({"eos_id": 50}, "eos_id"),
        ({"vocab_size": 51}, "vocab_size"),
        ({"never_ids": [50]}, "never_id"),
        ({"never_ids": range(50)}, "No token may be chosen"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "beam_size": 2}, "does not sample"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"top_k": 3}, "does not sample"),
        ({"num_samples": 0, "temperature": 1.0}, "num_samples"),
        ({"num_samples": 2}, "need a temperature"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    engine = engine_of(packed_model())
    with pytest.raises(EngineError, match=message):
        Generator(engine, GenerationOptions(**{"eos_id": EOS, "max_tokens": 4, **options}))


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    engine = engine_of(packed_model())
    generator = Generator(engine, GenerationOptions(EOS, 10))
    assert generator.add([3] * 55) == 0  # the last token generated takes no position
    with pytest.raises(EngineError, match="room for 9 of its 64"):
        generator.add([3] * 56)
    with pytest.raises(EngineError, match="at least one token"):
        generator.add([])
    with pytest.raises(EngineError, match="the id -1"):
        generator.add([3, -1])
    with pytest.raises(ValueError, match="image tokens"):
        generator.add([3], np.zeros((4, 31), np.float32))
    assert len(dict(generator)) == 1
    reader = engine_of(packed_model(attention_mode="bidirectional"))
    with pytest.raises(EngineError, match="bidirectional"):
        Generator(reader, GenerationOptions(EOS, 10))
