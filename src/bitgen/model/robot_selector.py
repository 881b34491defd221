"""Scores robots for a task by their texts, so that a robot can be added without training.

pooled task state BC  -> norm -> task_proj  -> q BC --.
pooled robot state RC -> norm -> robot_proj -> r RC ---+-> q . r / sqrt(C) + bias -> BR
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from bitgen.config import BitGenConfig
from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import make_linear

_LEAST_SHARE = 0.02  # what a few tasks can say at most


class RobotSelector(nn.Module):
    """One independent logit a robot (multi-label): sigmoid of it is the robot's probability."""

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.task_norm = RMSNorm(width, config.rms_norm_eps)
        self.robot_norm = RMSNorm(width, config.rms_norm_eps)
        self.task_proj = make_linear(width, width, config.quantization)
        self.robot_proj = make_linear(width, width, config.quantization)
        # Alike at the start: robots whose texts say what the task says then score higher, those
        # too that are never trained on.
        self.robot_proj.load_state_dict(self.task_proj.state_dict())
        self.shared_bias = nn.Parameter(torch.zeros(1))  # a vector: FSDP2 cuts no scalars
        self.robot_names = config.robot_names
        self.robot_bias = nn.Parameter(torch.zeros(len(config.robot_names)))
        # A linear model of the task's words, fitted before training and not trained with the rest
        # (bitgen.dataset.task_words): it goes with the weights.
        num_sets = len(config.robot_sets)
        if num_sets:
            for name, shape in (
                ("word_weights", (num_sets, config.task_word_bins)),
                ("word_bias", (num_sets,)),
                ("word_idf", (config.task_word_bins,)),
            ):
                self.register_buffer(name, torch.zeros(shape, dtype=torch.float16))

    @torch.no_grad()
    def start_from_shares(self, shares_R: Sequence[float], robots_RC: torch.Tensor) -> None:
        """Before training, guess each robot of the config about as often as it suits.

        Pooled states have much in common before they have learnt anything, so that any two texts
        score high; what other robots score for a robot's own text is taken off.

        Args:
            shares_R: of the tasks, 0 to 1, in the order of the config's robots.
            robots_RC: pooled states of their texts.
        """
        shares = torch.tensor(list(shares_R)).clamp(_LEAST_SHARE, 1 - _LEAST_SHARE)
        self.shared_bias.zero_()
        self.robot_bias.zero_()
        scores_RR = self(robots_RC, robots_RC, self.robot_names)
        others_RR = ~torch.eye(len(scores_RR), dtype=torch.bool, device=scores_RR.device)
        if len(scores_RR) > 1:
            self.shared_bias.fill_(-scores_RR[others_RR].mean())
        self.robot_bias.copy_(torch.logit(shares))

    def forward(
        self, task_BC: torch.Tensor, robots_RC: torch.Tensor, names: tuple[str, ...]
    ) -> torch.Tensor:
        """Logits `[B, R]`, float32; a robot whose name was seen in training adds its own bias."""
        queries_BC = self.task_proj(self.task_norm(task_BC)).float()
        keys_RC = self.robot_proj(self.robot_norm(robots_RC)).float()
        logits_BR = queries_BC @ keys_RC.T * queries_BC.shape[-1] ** -0.5 + self.shared_bias
        positions = [self.robot_names.index(n) if n in self.robot_names else -1 for n in names]
        no_bias = self.robot_bias.new_zeros(1)
        bias_R = torch.cat([self.robot_bias, no_bias])[positions]
        return logits_BR + bias_R
