"""Fits the linear model of tasks' words; see `bitgen.dataset.task_words`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from bitgen.dataset.robots import RobotTask
from bitgen.dataset.task_words import (
    TaskWords,
    inverse_document_frequencies,
    set_numbers,
    tfidf,
    word_parts,
)

_PENALTY = 1 / 30  # of half the squared weights, beside the summed loss
_MOST_ITERATIONS = 200


def fit_task_words(
    tasks: Sequence[RobotTask], names: Sequence[str], sets: Sequence[int], num_bins: int
) -> TaskWords:
    """Multinomial logistic regression with an L2 penalty, by L-BFGS: the loss has one minimum.

    Args:
        tasks: to learn from; those whose robots are none of `sets` are left out.
        names: of the robots.
        sets: of robots, at least one, as `robot_sets` gives them.
        num_bins: that parts of words are hashed into.
    """
    numbers = set_numbers(tasks, names, sets)
    known = [(task, n) for task, n in zip(tasks, numbers, strict=True) if n is not None]
    parts = [word_parts(task.task, num_bins) for task, _ in known]
    idf_D = inverse_document_frequencies(parts, num_bins)
    rows = [tfidf(found, idf_D) for found in parts]
    # Only the U bins that tasks use: the penalty leaves the others at 0, and few words use few.
    used_U, positions = np.unique(np.concatenate([bins for bins, _ in rows]), return_inverse=True)
    positions_M = torch.from_numpy(positions)
    values_M = torch.from_numpy(np.concatenate([weights for _, weights in rows]))
    starts_N = torch.tensor(np.cumsum([0, *(len(bins) for bins, _ in rows[:-1])]))
    targets_N = torch.tensor([number for _, number in known])
    weights_UZ = torch.zeros(len(used_U), len(sets), dtype=torch.float64, requires_grad=True)
    bias_Z = torch.zeros(len(sets), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights_UZ, bias_Z], max_iter=_MOST_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits_NZ = functional.embedding_bag(
            positions_M, weights_UZ, starts_N, mode="sum", per_sample_weights=values_M
        )
        total = functional.cross_entropy(logits_NZ + bias_Z, targets_N, reduction="sum")
        total = total + 0.5 * _PENALTY * weights_UZ.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    weights_ZD = np.zeros((len(sets), num_bins))
    weights_ZD[:, used_U] = weights_UZ.detach().T.numpy()
    return TaskWords(
        weights_ZD=weights_ZD,
        bias_Z=bias_Z.detach().numpy(),
        idf_D=idf_D,
        sets=tuple(sets),
        num_robots=len(names),
    )
