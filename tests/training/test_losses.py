from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bitgen.model.experts import MixtureOfExperts, Routing
from bitgen.training.losses import (
    caption_loss,
    count_caption_targets,
    count_future_targets,
    count_image_words,
    count_masked_targets,
    count_robot_labels,
    count_routed_tokens,
    expert_load,
    future_token_loss,
    image_word_loss,
    load_balancing_loss,
    masked_token_loss,
    robot_loss,
    router_z_loss,
)

NAN = float("nan")


def test_labels_are_shifted_once_and_only_valid_positions_count() -> None:
    torch.manual_seed(0)
    logits_BLV = torch.randn(2, 4, 7)
    labels_BL = torch.tensor([[-100, 3, 5, -100], [-100, -100, 2, 6]])
    total, count = caption_loss(logits_BLV, labels_BL)
    log_probabilities = logits_BLV.log_softmax(-1)
    expected = -(
        log_probabilities[0, 0, 3]
        + log_probabilities[0, 1, 5]
        + log_probabilities[1, 1, 2]
        + log_probabilities[1, 2, 6]
    )
    assert count.item() == count_caption_targets(labels_BL) == 4
    torch.testing.assert_close(total, expected)


def test_a_label_at_the_first_position_has_nothing_before_it_and_is_left_out() -> None:
    labels_BL = torch.tensor([[5, -100]])
    assert count_caption_targets(labels_BL) == 0
    total, count = caption_loss(torch.randn(1, 2, 7), labels_BL)
    assert (total.item(), count.item()) == (0.0, 0)


def head_of(vocabulary: int, width: int) -> torch.nn.Linear:
    torch.manual_seed(7)
    return torch.nn.Linear(width, vocabulary, bias=False)


@pytest.mark.parametrize("ahead", [1, 2, 3, 4, 6])
def test_each_future_token_has_its_own_shift_and_mask(ahead: int) -> None:
    torch.manual_seed(ahead)
    states_BLC = torch.randn(3, 6, 4)
    # One prompt of one token, one of three, and a row that is cut short.
    labels_BL = torch.tensor(
        [[-100, 1, 2, 3, 4, 5], [-100, -100, -100, 3, 0, 6], [-100, 2, 6, 1, -100, -100]]
    )
    lm_head = head_of(7, 4)
    total, count = future_token_loss(states_BLC, labels_BL, ahead, lm_head)
    expected, expected_count = torch.zeros(()), 0
    for row in range(3):
        for position in range(6 - ahead):
            label = int(labels_BL[row, position + ahead])
            if label != -100:
                log_probabilities_V = lm_head(states_BLC[row, position]).log_softmax(-1)
                expected = expected - log_probabilities_V[label]
                expected_count += 1
    assert int(count) == count_future_targets(labels_BL, ahead) == expected_count
    torch.testing.assert_close(total, expected)
    if ahead == 1:
        logits_total, _ = caption_loss(lm_head(states_BLC), labels_BL)
        torch.testing.assert_close(total, logits_total)


def test_future_tokens_beyond_every_row_cost_nothing() -> None:
    states_BLC = torch.randn(2, 3, 4, requires_grad=True)
    for labels_BL in (torch.tensor([[1, 2, 3]] * 2), torch.full((2, 3), -100)):
        total, count = future_token_loss(states_BLC, labels_BL, 5, head_of(7, 4))
        assert (total.item(), count.item(), count_future_targets(labels_BL, 5)) == (0.0, 0, 0)
        total.backward()
    assert states_BLC.grad is not None and not states_BLC.grad.any()


def test_the_head_is_given_only_rows_with_a_label_and_padding_has_no_say() -> None:
    states_BLC = torch.full((2, 5, 4), NAN)
    labels_BL = torch.full((2, 5), -100)
    labels_BL[1, 3] = 2
    states_BLC[1, 1] = 0.5
    seen: list[tuple[int, ...]] = []
    lm_head = head_of(7, 4)

    def spy(rows: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        logits: torch.Tensor = lm_head(rows)
        return logits

    states_BLC.requires_grad_()
    total, count = future_token_loss(states_BLC, labels_BL, 2, spy)
    total.backward()
    assert (seen, int(count)) == ([(1, 4)], 1) and total.isfinite()
    grad = states_BLC.grad
    assert grad is not None and grad[1, 1].any()
    grad[1, 1] = 0
    assert not grad.any()


def test_padding_changes_neither_loss_nor_gradients() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 5)
    short = logits.clone().requires_grad_()
    # What stands at padding, even NaN, has no say.
    long = torch.cat([logits, torch.full((1, 2, 5), NAN)], dim=1).requires_grad_()
    labels = torch.tensor([[-100, 1, 2]])
    padded_labels = torch.tensor([[-100, 1, 2, -100, -100]])
    short_loss, _ = caption_loss(short, labels)
    long_loss, _ = caption_loss(long, padded_labels)
    short_loss.backward()
    long_loss.backward()
    assert short.grad is not None and long.grad is not None
    assert torch.equal(short_loss, long_loss)
    assert torch.equal(short.grad, long.grad[:, :3])
    assert not long.grad[:, 3:].any()


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    total, count = caption_loss(torch.zeros(1, 3, 50), torch.tensor([[-100, 4, 9]]))
    assert total.item() / count.item() == pytest.approx(math.log(50))


def test_label_smoothing_gives_its_share_to_the_vocabulary() -> None:
    logits = torch.tensor([[[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]]])
    total, _ = caption_loss(logits, torch.tensor([[-100, 0]]), label_smoothing=0.3)
    log_probabilities = logits[0, 0].log_softmax(-1)
    expected = -0.7 * log_probabilities[0] - 0.3 * log_probabilities.mean()
    torch.testing.assert_close(total, expected)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.randn(1, 3, 50).bfloat16()
    total, _ = caption_loss(logits, torch.tensor([[-100, 4, 9]]))
    expected, _ = caption_loss(logits.float(), torch.tensor([[-100, 4, 9]]))
    assert total.dtype == torch.float32
    assert torch.equal(total, expected)


def test_robot_loss_skips_entries_without_label() -> None:
    logits_BR = torch.tensor([[1.0, -2.0], [0.5, 0.0], [7.0, 7.0]])
    labels_BR = torch.tensor([[1.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    total, count = robot_loss(logits_BR, labels_BR)
    sigmoid = torch.sigmoid
    expected = (
        -sigmoid(torch.tensor(1.0)).log()
        - (1 - sigmoid(torch.tensor(-2.0))).log()
        - sigmoid(torch.tensor(0.0)).log()
    )
    assert count.item() == count_robot_labels(labels_BR) == 3
    torch.testing.assert_close(total, expected)


def test_robot_loss_of_no_label_is_zero_and_has_a_gradient() -> None:
    logits = torch.ones(2, 3, requires_grad=True)
    total, count = robot_loss(logits, torch.full((2, 3), NAN))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert logits.grad is not None and not logits.grad.any()


def test_image_word_loss_is_the_cross_entropy_with_the_words_of_rows_that_have_any() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 7, requires_grad=True)
    ids = torch.tensor([[2, 5, 0], [0, 0, 0], [6, 0, 0]])
    weights = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    target = torch.zeros(3, 7)
    target[0, 2], target[0, 5], target[2, 6] = 0.25, 0.75, 1.0
    loss, count = image_word_loss(scores, ids, weights)
    expected = torch.nn.functional.cross_entropy(scores[[0, 2]], target[[0, 2]], reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert int(count) == count_image_words(weights) == 2
    loss.backward()
    assert scores.grad is not None and not scores.grad[1].any()
    assert count_image_words(torch.zeros(4, 0)) == 0


def test_masked_tokens_answer_for_themselves() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 6, 11, generator=generator)
    labels = torch.full((3, 6), -100)
    labels[0, 0], labels[0, 5], labels[2, 3] = 4, 10, 0
    loss, count = masked_token_loss(logits, labels)
    assert count == count_masked_targets(labels) == 3
    expected = sum(
        -logits[row, position].double().log_softmax(0)[token]
        for row, position, token in ((0, 0, 4), (0, 5, 10), (2, 3, 0))
    )
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    smooth, _ = masked_token_loss(logits, labels, label_smoothing=0.2)
    spread = sum(
        -logits[row, position].double().log_softmax(0).mean()
        for row, position in ((0, 0), (0, 5), (2, 3))
    )
    assert smooth.item() == pytest.approx(float(0.8 * expected + 0.2 * spread), rel=1e-6)
    none, count = masked_token_loss(logits.requires_grad_(), torch.full((3, 6), -100))
    assert count == 0 and none.item() == 0 and none.requires_grad


# Experts ----------------------------------------------------------------------------------------


def some_routings(
    num_tokens: int, experts_per_token: int, seed: int = 0, num_layers: int = 3
) -> tuple[list[Routing], list[np.ndarray], list[MixtureOfExperts]]:
    """Of random tokens and routers of four experts, and the logits of each, `[T, E]`."""
    torch.manual_seed(seed)
    routings, logits, mixtures = [], [], []
    for _ in range(num_layers):
        mixture = MixtureOfExperts([torch.nn.Identity() for _ in range(4)], 8, experts_per_token)
        torch.nn.init.normal_(mixture.router.weight)
        x_BSC = torch.randn(1, num_tokens, 8)
        routings.append(mixture(x_BSC)[1])
        logits.append((x_BSC[0] @ mixture.router.weight.T).detach().double().numpy())
        mixtures.append(mixture)
    return routings, logits, mixtures


@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_expert_losses_are_the_papers_formulas(experts_per_token: int) -> None:
    routings, logits, _ = some_routings(11, experts_per_token)
    balances, z_losses = [], []
    for logits_TE in logits:
        probabilities_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
        ranks_TE = np.argsort(np.argsort(-logits_TE, axis=1), axis=1)
        f_E = (ranks_TE < experts_per_token).sum(axis=0) / (11 * experts_per_token)
        balances.append(4 * (f_E * probabilities_TE.mean(axis=0)).sum())
        z_losses.append((np.log(np.exp(logits_TE).sum(axis=1)) ** 2).mean())
    balance, count = load_balancing_loss(routings)
    assert count == 11
    assert balance.item() / count == pytest.approx(np.mean(balances), rel=1e-5)
    z_loss, count = router_z_loss(routings)
    assert count == 11
    assert z_loss.item() / count == pytest.approx(np.mean(z_losses), rel=1e-5)


def test_balance_is_one_for_equal_shares_and_all_experts_for_one_alone() -> None:
    def routing(chosen: list[int], probabilities: list[float]) -> Routing:
        sums_E = 8 * torch.tensor(probabilities)
        return Routing(8, 1, torch.tensor(chosen), sums_E, torch.zeros(()))

    equal = routing([2, 2, 2, 2], [0.25] * 4)
    alone = routing([8, 0, 0, 0], [1.0, 0.0, 0.0, 0.0])
    for routings, expected in (([equal], 1.0), ([alone], 4.0), ([equal, alone], 2.5)):
        balance, count = load_balancing_loss(routings)
        assert balance.item() / count == pytest.approx(expected)


def test_expert_losses_move_the_router_towards_equal_shares_and_small_scores() -> None:
    for loss_of in (load_balancing_loss, router_z_loss):
        values = []
        _, _, mixtures = some_routings(64, 2, num_layers=1)
        optimizer = torch.optim.SGD(mixtures[0].router.parameters(), lr=0.01)
        x_BSC = torch.randn(1, 64, 8) + 1.0
        for _ in range(200):
            loss, count = loss_of([mixtures[0](x_BSC)[1]])
            optimizer.zero_grad()
            (loss / count).backward()
            optimizer.step()
            values.append(loss.item() / count)
        assert values[-1] < 0.9 * values[0]


def test_z_loss_adds_up_over_micro_batches() -> None:
    _, _, mixtures = some_routings(1, 2, num_layers=2)
    x_BSC = torch.randn(1, 12, 8)

    def part(start: int, end: int) -> tuple[torch.Tensor, int]:
        return router_z_loss([mixture(x_BSC[:, start:end])[1] for mixture in mixtures])

    (first, first_count), (rest, rest_count), (whole, count) = part(0, 5), part(5, 12), part(0, 12)
    assert (first_count + rest_count, count) == (12, 12)
    torch.testing.assert_close(first + rest, whole)


def test_expert_losses_without_any_token_are_zero() -> None:
    routings, _, mixtures = some_routings(0, 2, num_layers=1)
    losses = [load_balancing_loss(routings), router_z_loss(routings)]
    assert [(loss.item(), count) for loss, count in losses] == [(0.0, 0)] * 2
    sum(loss for loss, _ in losses).backward()
    assert not mixtures[0].router.weight.grad.any()
    assert expert_load(torch.stack([r.chosen_E for r in routings])) == [[0.0] * 4]


def test_load_is_each_experts_share_of_the_choices() -> None:
    routings, logits, _ = some_routings(10, 2)
    shares = expert_load(torch.stack([routing.chosen_E for routing in routings]))
    for layer, logits_TE in zip(shares, logits, strict=True):
        chosen = np.argsort(-logits_TE, axis=1)[:, :2].ravel()
        assert layer == pytest.approx(np.bincount(chosen, minlength=4) / 20)
    assert [sum(layer) for layer in shares] == pytest.approx([1.0] * 3)


def test_routed_tokens_are_text_and_image_tokens() -> None:
    attention_mask_BL = torch.tensor([[1, 1, 1], [1, 0, 0]])
    image_mask_B = torch.tensor([False, True])
    assert count_routed_tokens(attention_mask_BL, image_mask_B, 5) == 4 + 5
    assert count_routed_tokens(attention_mask_BL, image_mask_B, 0) == 4
