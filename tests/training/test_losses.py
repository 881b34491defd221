from __future__ import annotations

import math

import pytest
import torch

from bitgen.dataset.robots import RobotTask
from bitgen.training.losses import (
    caption_loss,
    count_caption_targets,
    count_exact_matches,
    count_image_words,
    count_robot_labels,
    image_word_loss,
    robot_loss,
    robot_positive_weight,
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


def test_robot_loss_skips_entries_without_label_and_weighs_positives() -> None:
    logits_BR = torch.tensor([[1.0, -2.0], [0.5, 0.0], [7.0, 7.0]])
    labels_BR = torch.tensor([[1.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    total, count = robot_loss(logits_BR, labels_BR, torch.tensor([2.0, 3.0]))
    sigmoid = torch.sigmoid
    expected = (
        -2 * sigmoid(torch.tensor(1.0)).log()
        - (1 - sigmoid(torch.tensor(-2.0))).log()
        - 3 * sigmoid(torch.tensor(0.0)).log()
    )
    assert count.item() == count_robot_labels(labels_BR) == 3
    torch.testing.assert_close(total, expected)


def test_robot_loss_of_no_label_is_zero_and_has_a_gradient() -> None:
    logits = torch.ones(2, 3, requires_grad=True)
    total, count = robot_loss(logits, torch.full((2, 3), NAN), torch.ones(3))
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert logits.grad is not None and not logits.grad.any()


def test_exact_match_needs_every_labelled_robot_of_a_row() -> None:
    logits_BR = torch.tensor([[3.0, -1.0], [3.0, 1.0], [-1.0, 2.0], [5.0, 5.0]])
    labels_BR = torch.tensor([[1.0, 0.0], [1.0, 0.0], [NAN, 1.0], [NAN, NAN]])
    matches, rows = count_exact_matches(logits_BR, labels_BR)
    assert (matches.item(), rows.item()) == (2, 3)


def test_positive_weight_is_negatives_over_positives_within_the_cap() -> None:
    tasks = [RobotTask("a", ("Drone",)), *[RobotTask(str(i), ("Diver",)) for i in range(3)]]
    weights = robot_positive_weight(tasks, ["Drone", "Diver", "Humanoid"])
    torch.testing.assert_close(weights, torch.tensor([3.0, 1 / 3, 1.0]))
    many = [RobotTask("a", ("Drone",)), *[RobotTask(str(i), ("Diver",)) for i in range(99)]]
    torch.testing.assert_close(
        robot_positive_weight(many, ["Drone", "Diver"], cap=5.0), torch.tensor([5.0, 0.2])
    )
    assert robot_positive_weight([], []).shape == (0,)


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
