"""What the ternary weights do in training: how many of each value, and how many change."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from bitgen.model.ternary import TernaryLinear
from bitgen.training.distributed import whole


class TernaryStatistics:
    """Counts the ternary weights of a model that is being trained.

    Attributes:
        num_weights: ternary weights of all layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {
            name: module for name, module in model.named_modules()
            if isinstance(module, TernaryLinear)
        }  # fmt: skip
        self.num_weights = sum(layer.weight.numel() for layer in self._layers.values())
        self._before: dict[str, torch.Tensor] = {}

    def remember(self) -> None:
        """Keep the values, int8, to count at the next `flips` what has changed since."""
        self._before = self._quantize()

    def flips(self) -> int:
        """How many ternary weights have another value than when they were remembered."""
        now = self._quantize()
        changed = [(now[name] != before).sum() for name, before in self._before.items()]
        self._before = {}
        return int(torch.stack(changed).sum()) if changed else 0

    def shares(self) -> dict[str, tuple[float, float, float]]:
        """Share of -1, 0 and +1 in each layer, by its name."""
        counts = {
            name: torch.stack([(ternary_NK == value).float().mean() for value in (-1, 0, 1)])
            for name, ternary_NK in self._quantize().items()
        }
        if not counts:
            return {}
        rows = torch.stack(list(counts.values())).tolist()
        return {name: tuple(row) for name, row in zip(counts, rows, strict=True)}

    def total(self, shares: Mapping[str, tuple[float, float, float]]) -> tuple[float, float, float]:
        """The `shares` of all layers together: their mean, each by its number of weights."""
        counts = {name: self._layers[name].weight.numel() for name in shares}
        minus, zero, plus = (
            sum(counts[name] * of_layer[value] for name, of_layer in shares.items())
            / max(1, self.num_weights)
            for value in range(3)
        )
        return minus, zero, plus

    @torch.no_grad()
    def _quantize(self) -> dict[str, torch.Tensor]:
        return {name: whole(layer.ternary()) for name, layer in self._layers.items()}
