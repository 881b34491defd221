"""Speculative decoding says token by token what plain greedy decoding says, in fewer calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bitgen.errors import InputError
from bitgen.inference import generate as generation
from bitgen.inference.generate import Generation, generate

from .test_generate import BOS, EOS, NEVER, PROMPTS, USED_VOCABULARY, run, toy_images, toy_model


@pytest.fixture(autouse=True)
def draft_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained heads are never sure of themselves."""
    monkeypatch.setattr(generation, "_WORTH_CHECKING", 0.0)
    monkeypatch.setattr(generation, "_WORTH_GOING_ON", 0.0)


def with_oracle(
    monkeypatch: pytest.MonkeyPatch, expected: Sequence[Generation], error: float
) -> None:
    """Drafts that are right but for some: then every number of them is accepted now and then."""
    tokens = [[*row.tokens, *[EOS] * 40] for row in expected]
    generator = torch.Generator().manual_seed(len(expected))
    rows: list[Any] = []
    make_row = generation._SpeculativeRow

    def remember(*arguments: Any) -> Any:
        rows.append(make_row(*arguments))
        return rows[-1]

    def draft(
        self: Any, state_BC: torch.Tensor, tokens_B: torch.Tensor, running: list[bool], most: int
    ) -> torch.Tensor:
        current = rows[-len(running) :]
        count = min(len(self.model.future_heads), most)
        true = torch.tensor(
            [known[len(row.tokens) :][:count] for known, row in zip(tokens, current, strict=True)],
            dtype=torch.int64,
        )
        wrong = torch.rand(true.shape, generator=generator) < error
        other = torch.randint(5, USED_VOCABULARY, true.shape, generator=generator)
        return torch.where(wrong, other, true)

    monkeypatch.setattr(generation, "_SpeculativeRow", remember)
    monkeypatch.setattr(generation._Drafter, "draft", draft)


def answers(generations: Sequence[Generation]) -> list[tuple[list[int], bool]]:
    return [(g.tokens, g.finished) for g in generations]


@pytest.mark.parametrize("quantization", ["none", "ternary"])
@pytest.mark.parametrize("predict_tokens", [2, 5])
@pytest.mark.parametrize("drafts", ["heads", "oracle"])
def test_it_says_what_plain_greedy_says(
    quantization: str, predict_tokens: int, drafts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tolerance = 1e-4 if quantization == "none" else 0.05
    ended, saved = set(), 0
    for seed in range(6):
        mode = "prefix" if seed % 3 else "causal"
        model = toy_model(
            seed, quantization=quantization, predict_tokens=predict_tokens, attention_mode=mode
        )
        prompts = [*PROMPTS, *PROMPTS][: 1 + seed % 5]
        images = toy_images(len(prompts), seed) if seed % 2 else None
        for max_tokens in (1, 7, 20):
            options: dict[str, Any] = {"images": images, "max_tokens": max_tokens}
            plain = run(model, prompts, speculative=False, **options)
            with monkeypatch.context() as patch:
                if drafts == "oracle":
                    with_oracle(patch, plain, error=0.3)
                fast = run(model, prompts, speculative=True, **options)
            assert answers(fast) == answers(plain)
            for one, other in zip(fast, plain, strict=True):
                assert one.log_probability == pytest.approx(other.log_probability, abs=tolerance)
                assert other.speculation is None and one.speculation is not None
                ended.add(one.finished)
                saved += len(one.tokens) + one.finished - one.speculation.model_calls
    assert ended == {True, False} and saved > (50 if drafts == "oracle" else 2)


def test_it_does_so_in_float64_bit_for_bit_of_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        model = toy_model(seed, quantization="none", predict_tokens=5).double()
        images = toy_images(3, seed).double()
        plain = run(model, PROMPTS, images=images, max_tokens=18, speculative=False)
        with monkeypatch.context() as patch:
            with_oracle(patch, plain, error=0.4)
            fast = run(model, PROMPTS, images=images, max_tokens=18, speculative=True)
        assert answers(fast) == answers(plain)
        for one, other in zip(fast, plain, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)


def test_counts_of_perfect_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows alone, so that the calls can be counted from outside too."""
    cut_inside, ended_inside = 0, 0
    for seed in range(6):
        model = toy_model(seed, quantization="none", predict_tokens=4)
        calls: list[int] = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        for max_tokens in (5, 12):
            (plain,) = run(model, [[BOS]], max_tokens=max_tokens, speculative=False)
            with monkeypatch.context() as patch:
                with_oracle(patch, [plain], error=0.0)
                calls.clear()
                (fast,) = run(model, [[BOS]], max_tokens=max_tokens)
            total = len(plain.tokens) + plain.finished
            counts = fast.speculation
            assert counts is not None and answers([fast]) == answers([plain])
            # The prompt's call gives one token, every other one four.
            assert counts.model_calls == len(calls) == 1 + -(-(total - 1) // 4)
            cut_inside += not plain.finished and (total - 1) % 4 != 0
            ended_inside += plain.finished and (total - 1) % 4 != 0
            assert counts.accepted <= counts.drafted <= 3 * (counts.model_calls - 1)
            if (total - 1) % 4 == 0:
                assert counts.accepted == counts.drafted == 3 * (counts.model_calls - 1)
    assert ended_inside and cut_inside
    (plain,) = run(model, [[BOS]], max_tokens=1, speculative=True)
    assert plain.speculation == generation.Speculation(model_calls=1, drafted=0, accepted=0)


def test_heads_go_on_from_the_state_that_chose_the_last_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong states would cost speed alone, so that no comparison of captions could show them."""
    image, num_rejected = toy_images(1), 0
    for seed, prompt in enumerate(([BOS], [BOS, 5, 6], [BOS, 7], [BOS, 6], [BOS, 7, 7], [BOS])):
        model = toy_model(seed, quantization="none", predict_tokens=5)
        (plain,) = run(model, [prompt], images=image, max_tokens=18, speculative=False)
        mask = model.build_attention_mask(
            torch.ones(1, len(prompt) + len(plain.tokens)), torch.tensor([len(prompt)])
        )
        ids_1L = torch.tensor([[*prompt, *plain.tokens]])
        with torch.no_grad():
            true_LC = model(ids_1L, image, mask).states[0, len(prompt) - 1 :]
        with monkeypatch.context() as patch:
            with_oracle(patch, [plain], error=0.5)
            draft = generation._Drafter.draft
            starts: list[int] = []

            def spy(
                self: Any, state_BC: torch.Tensor, *arguments: Any, true=true_LC, draft=draft,
                starts=starts, **options: Any,
            ) -> torch.Tensor:  # fmt: skip
                distance_L = (true - state_BC).abs().amax(dim=1)
                assert distance_L.min() < 1e-4
                starts.append(int(distance_L.argmin()))
                return draft(self, state_BC, *arguments, **options)

            patch.setattr(generation._Drafter, "draft", spy)
            (fast,) = run(model, [prompt], images=image, max_tokens=18)
        assert starts == sorted(set(starts)) and 0 in [*starts, len(plain.tokens)]
        assert fast.speculation is not None
        num_rejected += fast.speculation.drafted - fast.speculation.accepted
    assert num_rejected > 3


def test_wrong_drafts_cost_calls_but_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model(4, quantization="none", predict_tokens=4)
    plain = run(model, PROMPTS, max_tokens=10, speculative=False)
    wrong = [Generation([5 + (t - 4) % 3 for t in g.tokens], 0.0, g.finished) for g in plain]
    with monkeypatch.context() as patch:
        with_oracle(patch, wrong, error=0.0)
        fast = run(model, PROMPTS, max_tokens=10)
    assert answers(fast) == answers(plain)
    for row in fast:
        assert row.speculation is not None
        # A row's end is drafted as an end: that alone may be right.
        assert row.speculation.accepted <= 1


def test_never_ids_are_neither_drafted_nor_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    for seed in range(6):
        model = toy_model(seed, predict_tokens=4)
        with torch.no_grad():
            model.text_decoder.embed_tokens.weight[[0, 1, 3, 4, 8, 9, 10]] *= 4
        model.register_forward_pre_hook(lambda _, ids: seen.append(ids[0]))
        images = toy_images(3)
        plain = run(model, PROMPTS, images=images, max_tokens=12, speculative=False)
        seen.clear()
        fast = run(model, PROMPTS, images=images, max_tokens=12, speculative=True)
        assert answers(fast) == answers(plain)
        drafted = torch.cat([ids.flatten() for ids in seen[1:]])
        assert not set(drafted.tolist()) & {*NEVER, 8, 9, 10}
    free = generate(model, images, PROMPTS, EOS, 12, speculative=True)
    assert any(set(g.tokens) & {*NEVER, 8, 9, 10} for g in free)


def test_a_text_up_to_the_last_position_fits() -> None:
    """Finished rows, drafts and a padded prompt must not run out of positions or of the cache."""
    for seed in range(8):
        model = toy_model(seed, quantization="none", predict_tokens=8)
        room = model.config.max_positions - model.num_image_tokens - max(map(len, PROMPTS)) + 1
        options: dict[str, Any] = {"images": toy_images(3, seed), "max_tokens": room}
        assert answers(run(model, PROMPTS, speculative=True, **options)) == answers(
            run(model, PROMPTS, speculative=False, **options)
        )


def test_a_batch_answers_as_each_row_alone() -> None:
    model = toy_model(1, quantization="none", predict_tokens=4)
    images = toy_images(3)
    together = run(model, PROMPTS, images=images, max_tokens=15, speculative=True)
    for row, prompt in enumerate(PROMPTS):
        (alone,) = run(
            model, [prompt], images=images[row : row + 1], max_tokens=15, speculative=True
        )
        assert answers([alone]) == answers([together[row]])


def test_drafts_end_where_the_heads_are_unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model(2, quantization="none", predict_tokens=6)
    drafter = generation._Drafter(model, generation._never_mask(model, NEVER, USED_VOCABULARY), EOS)
    assert drafter.num_tokens == USED_VOCABULARY
    state_BC = torch.randn(4, 16)
    tokens_B = torch.tensor([5, 6, 7, 5])
    running = [True, True, False, True]
    with torch.no_grad():
        all_drafts = drafter.draft(state_BC, tokens_B, running, most=9)
        # By hand: the product of the best probabilities over the tokens in use.
        state, token, sure = state_BC, tokens_B, torch.ones(4)
        expected, open_ended = [], []
        for index in range(5):
            state = model.future_state(index, state, token)
            logits = model.text_decoder.lm_head(state)[:, :USED_VOCABULARY]
            token = logits.index_fill(1, torch.tensor(NEVER), -torch.inf).argmax(dim=1)
            sure = sure * logits.softmax(dim=1).gather(1, token[:, None])[:, 0]
            assert torch.equal(all_drafts[:, index], token)
            expected.append(float(sure[[0, 1, 3]].mean()))
            sure = torch.where(token == EOS, 0.0, sure)
            open_ended.append(float(sure[[0, 1, 3]].mean()))
        for least in (*expected, 1.1):
            # What is likely enough is checked, and one that is not ends the drafts ...
            monkeypatch.setattr(generation, "_WORTH_CHECKING", least * (1 - 1e-5))
            drafts = drafter.draft(state_BC, tokens_B, running, most=9)
            assert drafts.shape == (4, sum(value >= least for value in expected))
            monkeypatch.setattr(generation, "_WORTH_CHECKING", 0.0)
            # ... and another is made only behind one that is likelier still (ends are not).
            monkeypatch.setattr(generation, "_WORTH_GOING_ON", least * (1 - 1e-5))
            drafts = drafter.draft(state_BC, tokens_B, running, most=9)
            assert drafts.shape == (4, min(5, 1 + sum(value >= least for value in open_ended)))
            monkeypatch.setattr(generation, "_WORTH_GOING_ON", 0.0)
    assert drafter.draft(state_BC, tokens_B, running, most=0).shape == (4, 0)


def test_heads_that_are_of_no_use_are_asked_more_and_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = toy_model(2, quantization="none", predict_tokens=2)
    drafter = generation._Drafter(model, generation._never_mask(model, NEVER, USED_VOCABULARY), EOS)

    def asked(accepted: int, calls: int) -> str:
        marks = ""
        for _ in range(calls):
            with torch.no_grad():
                drafts = drafter.draft(torch.randn(2, 16), torch.tensor([5, 6]), [True] * 2, most=3)
            marks += "d" if drafts.shape[1] else "."
            drafter.hear(accepted if drafts.shape[1] else 0, 2)
        return marks

    monkeypatch.setattr(generation, "_WORTH_GOING_ON", 0.5)
    assert asked(1, 4) == "dddd"
    assert asked(0, 34) == "ddd.d...d.......d" + "." * 15 + "d."
    while asked(2, 1) == ".":
        pass
    assert asked(2, 5) == "ddddd"


# What is refused, and what is chosen by itself ---------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"beam_size": 2}, {"temperature": 1.0}, {"attention_window": 4}]
)
def test_it_is_greedy_and_reads_everything(options: dict[str, Any]) -> None:
    model = toy_model(predict_tokens=3)
    with pytest.raises(InputError, match="Speculative decoding is greedy"):
        run(model, PROMPTS, speculative=True, **options)
    assert all(g.speculation is None for g in run(model, PROMPTS, **options))
    run(model, PROMPTS, speculative=False, **options)


def test_a_model_without_heads_is_told_how_to_get_them() -> None:
    with pytest.raises(InputError, match="no future token heads") as failure:
        run(toy_model(), PROMPTS, speculative=True)
    assert failure.value.remedy is not None and "--predict_tokens" in failure.value.remedy
    assert all(g.speculation is None for g in run(toy_model(), PROMPTS))


@pytest.mark.parametrize(("rows", "by_itself"), [(1, True), (4, True), (5, False)])
def test_small_batches_draft_by_themselves(rows: int, by_itself: bool) -> None:
    model, prompts = toy_model(predict_tokens=3), [[BOS]] * rows
    assert all((g.speculation is not None) == by_itself for g in run(model, prompts))
    assert all(g.speculation is not None for g in run(model, prompts, speculative=True))
