"""Mixture of experts: each token is fed forward by the few experts that a router chooses for it.

    x TC -> router -> softmax -> top k -> (token, expert) pairs, sorted by expert
                                              |  expert 0's slice -> FeedForward --.
                                              |  expert 1's slice -> FeedForward --+-> y TC
                                              '  ...                               --'

Top-k routing with weights renormalised over the chosen is Mixtral's (arXiv 2401.04088, section
2.1). Nothing is dropped and nothing padded: each expert takes as many tokens as chose it, after
MegaBlocks (arXiv 2211.15841).

Shape letters: B batch, S positions, T tokens that are routed, K experts a token, M = T * K pairs,
E experts, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

_ROUTER_GAIN = 0.1


@dataclass(frozen=True)
class Routing:
    """What a router decided for the tokens of one layer and call: sums, so that calls add up.

    Attributes:
        num_tokens: T.
        experts_per_token: K.
        chosen_E: int64, how many tokens chose each expert; they add up to M.
        probability_sums_E: float32, each expert's probability added over the tokens, with
            gradient.
        z_sum: float32 scalar, `logsumexp(logits)^2` added over the tokens, with gradient.
    """

    num_tokens: int
    experts_per_token: int
    chosen_E: torch.Tensor
    probability_sums_E: torch.Tensor
    z_sum: torch.Tensor


def routing_weights(
    logits_TE: torch.Tensor, experts_per_token: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The experts of each token.

    Two and more share a weight of 1. One alone is weighted by its probability (Switch, arXiv
    2101.03961, equation 2): renormalised it would always weigh 1, and the router would learn
    nothing from what the expert answers.

    Args:
        logits_TE: the router's scores, float32 or float64.
        experts_per_token: K.

    Returns:
        Weights `[T, K]` and experts int64 `[T, K]`, likeliest first, and the probabilities
        `[T, E]`.
    """
    probabilities_TE = logits_TE.softmax(dim=-1)
    weights_TK, experts_TK = probabilities_TE.topk(experts_per_token, dim=-1)
    if experts_per_token > 1:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK, experts_TK, probabilities_TE


def mixture_of_experts_reference(
    x_TC: torch.Tensor,
    router_weight_EC: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    experts_per_token: int,
) -> torch.Tensor:
    """The output `[T, C]`, one token and expert after the other: slow, for tests."""
    rows = []
    for x_C in x_TC:
        probability_E = (router_weight_EC @ x_C).softmax(dim=0)
        chosen = probability_E.argsort(descending=True)[:experts_per_token].tolist()
        total = sum(probability_E[e] for e in chosen) if len(chosen) > 1 else 1.0
        rows.append(sum(probability_E[e] / total * experts[e](x_C[None])[0] for e in chosen))
    return torch.stack(rows)


class MixtureOfExperts(nn.Module):
    """E feed-forward layers, of which each token takes K, `[B, S, C] -> [B, S, C]`.

    The router is a float linear layer whatever the experts are: it has few weights, and a choice
    among experts is not as forgiving of rounding as a sum over many inputs. It computes in float32
    under autocast too (Switch, arXiv 2101.03961, section 2.4).
    """

    def __init__(
        self, experts: Sequence[nn.Module], hidden_size: int, experts_per_token: int
    ) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.router = nn.Linear(hidden_size, len(experts), bias=False)
        # Inputs are normalised: logits of a tenth, so that all experts are tried at first.
        nn.init.normal_(self.router.weight, std=_ROUTER_GAIN / math.sqrt(hidden_size))
        self.experts = nn.ModuleList(experts)

    def forward(
        self, x_BSC: torch.Tensor, tokens_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Routing]:
        """Route and feed forward.

        Args:
            x_BSC: normalised states.
            tokens_T: int64, where tokens stand among the B * S positions; the others are padding,
                which no expert sees and which gets zeros. None = all are tokens.
        """
        flat_NC = x_BSC.reshape(-1, x_BSC.shape[-1])
        x_TC = flat_NC if tokens_T is None else flat_NC.index_select(0, tokens_T)
        weights_TK, experts_TK, routing = self._route(x_TC)
        y_TC = self._feed_forward(x_TC, weights_TK, experts_TK, routing.chosen_E)
        if tokens_T is not None:
            y_TC = y_TC.new_zeros(flat_NC.shape).index_copy(0, tokens_T, y_TC)
        return y_TC.view(x_BSC.shape), routing

    def _route(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        dtype = torch.promote_types(x_TC.dtype, torch.float32)
        with _without_autocast(x_TC.device.type):
            logits_TE = functional.linear(x_TC.to(dtype), self.router.weight.to(dtype))
            weights_TK, experts_TK, probabilities_TE = routing_weights(
                logits_TE, self.experts_per_token
            )
            all_E = torch.arange(len(self.experts), device=x_TC.device)
            routing = Routing(
                num_tokens=len(x_TC),
                experts_per_token=self.experts_per_token,
                chosen_E=(experts_TK.flatten()[:, None] == all_E).sum(dim=0),
                probability_sums_E=probabilities_TE.sum(dim=0),
                z_sum=logits_TE.logsumexp(dim=-1).square().sum(),
            )
        return weights_TK, experts_TK, routing

    def _feed_forward(
        self,
        x_TC: torch.Tensor,
        weights_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        chosen_E: torch.Tensor,
    ) -> torch.Tensor:
        """Each expert on the tokens that chose it, added by weight: `[T, C]`."""
        order_M = experts_TK.flatten().argsort(stable=True)
        sorted_MC = x_TC.index_select(0, order_M // self.experts_per_token)
        slices = sorted_MC.split(_sizes(chosen_E, len(order_M)))
        # In training an expert without tokens runs too, on none: its gradient is then zero and
        # not missing, which DistributedDataParallel would wait for.
        y_MC = torch.cat(
            [
                expert(slice_C)
                for expert, slice_C in zip(self.experts, slices, strict=True)
                if len(slice_C) or torch.is_grad_enabled()
            ]
            or [sorted_MC]
        )
        y_TKC = (
            torch.empty_like(y_MC)
            .index_copy(0, order_M, y_MC)
            .view(*experts_TK.shape, y_MC.shape[1])
        )
        return (y_TKC * weights_TK[..., None].to(y_MC.dtype)).sum(dim=1)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if device_type == "meta":  # autocast does not know it
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _sizes(chosen_E: torch.Tensor, num_pairs: int) -> list[int]:
    """How many pairs each expert takes: one read from the device.

    Without data (device meta, fake tensors) all take about as many.
    """
    if chosen_E.device.type != "meta" and not hasattr(chosen_E, "fake_mode"):
        sizes: list[int] = chosen_E.tolist()
        return sizes
    num_experts = len(chosen_E)
    return [(num_pairs + e) // num_experts for e in range(num_experts)]
