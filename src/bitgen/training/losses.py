"""The losses of training, each as a sum and the count to divide it by.

Sums, not means: the trainer adds them over all micro-batches of one update and divides once, so
that accumulation and padding never change what a token weighs.

    B batch   L text length   V vocabulary   R robots   E experts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from bitgen.model.experts import Routing

IGNORE_INDEX = -100


def caption_targets(labels_BL: torch.Tensor, ahead: int = 1) -> torch.Tensor:
    """What each position has to predict, [B, L - ahead]: the labels shifted, by one for the next.

    This is the only place where labels are shifted; `labels_BL` is aligned with the input tokens.
    """
    return labels_BL[:, ahead:]


def count_caption_targets(labels_BL: torch.Tensor) -> int:
    """Number of positions that `caption_loss` sums over."""
    return int((caption_targets(labels_BL) != IGNORE_INDEX).sum())


def count_future_targets(labels_BL: torch.Tensor, ahead: int) -> int:
    """Number of positions that `future_token_loss` sums over."""
    return int((caption_targets(labels_BL, ahead) != IGNORE_INDEX).sum())


def count_robot_labels(robot_labels_BR: torch.Tensor) -> int:
    """Number of entries that `robot_loss` sums over."""
    return int((~robot_labels_BR.isnan()).sum())


def caption_loss(
    logits_BLV: torch.Tensor, labels_BL: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the next token, in nats: (sum over valid positions, their count).

    Args:
        logits_BLV: scores of the text positions, any float dtype; summed in float32.
        labels_BL: int64, aligned with the input tokens, -100 where no loss is wanted.
        label_smoothing: share of the target spread over the vocabulary.

    Returns:
        float32 scalar sum (0 with gradient where no position is valid) and int64 scalar count.
    """
    return _token_loss(logits_BLV[:, :-1], caption_targets(labels_BL), label_smoothing)


def _token_loss(
    logits_BLV: torch.Tensor, targets_BL: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    targets = targets_BL.flatten()
    valid = targets != IGNORE_INDEX
    # Only rows with a label become float32: padding and prompts cost no memory here.
    logits = logits_BLV.flatten(0, 1)[valid].float()
    loss = functional.cross_entropy(
        logits, targets[valid], reduction="sum", label_smoothing=label_smoothing
    )
    return loss, valid.sum()


def count_masked_targets(labels_BL: torch.Tensor) -> int:
    """Number of positions that `masked_token_loss` sums over."""
    return int((labels_BL != IGNORE_INDEX).sum())


def masked_token_loss(
    logits_BLV: torch.Tensor, labels_BL: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the hidden tokens, in nats: (sum over chosen positions, their count).

    Nothing is shifted: each position answers for itself (BERT, arXiv 1810.04805, section 3.1).
    Arguments and results are otherwise those of `caption_loss`.
    """
    return _token_loss(logits_BLV, labels_BL, label_smoothing)


def future_token_loss(
    states_BLC: torch.Tensor,
    labels_BL: torch.Tensor,
    ahead: int,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the token `ahead` positions on, in nats: (sum, count of positions).

    As in `caption_loss` a position counts where the token that it predicts has a label, so those
    of the prompt before it do too. Rows are padded on the right, so every such position is a token.
    Losses of several future tokens: arXiv 2404.19737, equation 2; arXiv 2412.19437, equation 24.

    Args:
        states_BLC: `BitGenOutput.future_states[ahead - 2]`.
        labels_BL: int64, aligned with the input tokens, -100 where no loss is wanted.
        ahead: which token is predicted; 2 is the one behind the next.
        lm_head: `text_decoder.lm_head`. It is given the rows that have a label, and no others.
        label_smoothing: share of the target spread over the vocabulary.
    """
    targets = caption_targets(labels_BL, ahead)
    valid = targets != IGNORE_INDEX
    logits_MV = lm_head(states_BLC[:, : targets.shape[1]][valid]).float()
    loss = functional.cross_entropy(
        logits_MV, targets[valid], reduction="sum", label_smoothing=label_smoothing
    )
    return loss, valid.sum()


def self_critical_loss(
    logits_BLV: torch.Tensor,
    sources_M: torch.Tensor,
    targets_M: torch.Tensor,
    advantages_M: torch.Tensor,
    is_reference_M: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`-advantage * log p` of drawn captions, and the cross-entropy of reference captions.

    The gradient of the first one is that of minus the expected reward (REINFORCE; arXiv 1612.00563,
    equation 7). Both are sums over tokens; the first one's is divided by the number of captions.

    Args:
        logits_BLV: scores, any float dtype; summed in float32.
        sources_M: int64, columns of the flattened `[B * L]` that predict a token.
        targets_M: int64, that token.
        advantages_M: float32, of the caption that it is of.
        is_reference_M: bool, tokens of references.

    Returns:
        float32 scalars: of drawn captions, of references.
    """
    logits_MV = logits_BLV.flatten(0, 1)[sources_M].float()
    losses_M = functional.cross_entropy(logits_MV, targets_M, reduction="none")
    drawn = (losses_M * advantages_M).masked_fill(is_reference_M, 0.0).sum()
    return drawn, losses_M[is_reference_M].sum()


def robot_loss(
    robot_logits_BR: torch.Tensor, robot_labels_BR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of each robot by itself, in nats: (sum, count of labels).

    Args:
        robot_logits_BR: scores before the sigmoid, any float dtype; summed in float32.
        robot_labels_BR: 1 suits, 0 does not, NaN has no label and no loss.
    """
    labelled = ~robot_labels_BR.isnan()
    loss = functional.binary_cross_entropy_with_logits(
        robot_logits_BR[labelled].float(), robot_labels_BR[labelled].float(), reduction="sum"
    )
    return loss, labelled.sum()


def count_image_words(word_weights_BW: torch.Tensor) -> int:
    """Number of rows that `image_word_loss` sums over."""
    return int((word_weights_BW.sum(dim=1) > 0).sum()) if word_weights_BW.numel() else 0


def image_word_loss(
    image_words_BV: torch.Tensor, word_ids_BW: torch.Tensor, word_weights_BW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the words of a picture's captions, in nats: (sum, rows that have words).

    It gives the image encoder a direct signal: the caption loss alone reaches it through the whole
    decoder, and training from scratch then stays long at captions that fit any picture. Words as
    labels of pictures: arXiv 1511.02251.

    Args:
        image_words_BV: scores of the vocabulary, any float dtype; summed in float32.
        word_ids_BW: int64, the tokens.
        word_weights_BW: float32, adding up to 1 a row, or all 0 where there are none.
    """
    log_probabilities_BV = image_words_BV.float().log_softmax(dim=-1)
    loss = -(log_probabilities_BV.gather(1, word_ids_BW) * word_weights_BW).sum()
    return loss, (word_weights_BW.sum(dim=1) > 0).sum()


def count_routed_tokens(
    attention_mask_BL: torch.Tensor, image_mask_B: torch.Tensor, num_image_tokens: int
) -> int:
    """Number of tokens that `load_balancing_loss` and `router_z_loss` sum over.

    Args:
        attention_mask_BL: 1 = token.
        image_mask_B: rows with a picture.
        num_image_tokens: tokens a picture; 0 where the model is given no pictures.
    """
    return int(attention_mask_BL.sum()) + num_image_tokens * int(image_mask_B.sum())


def load_balancing_loss(routings: Sequence[Routing]) -> tuple[torch.Tensor, int]:
    """How far experts are from equal shares: (sum over tokens, their count), mean of the layers.

    Per layer `E sum_e f_e P_e` with the share of choices `f_e`, without gradient, and the mean
    probability `P_e` (Switch, arXiv 2101.03961, equations 4 to 6): 1 for equal shares, up to E.
    With K experts a token `f_e` is the share of all K choices (as in MegaBlocks), so 1 stays 1.

    It is a product of two means over the tokens of one call, so gradient accumulation averages the
    losses of its micro-batches, weighted by their tokens; that is not the loss of all the tokens
    together.
    """
    layers = [
        len(routing.chosen_E)
        * (routing.chosen_E / routing.chosen_E.sum().clamp(min=1) * routing.probability_sums_E)
        for routing in routings
    ]
    return torch.stack(layers).sum(dim=1).mean(), routings[0].num_tokens


def router_z_loss(routings: Sequence[Routing]) -> tuple[torch.Tensor, int]:
    """Size of the router's scores: (sum over tokens, their count), mean of the layers.

    `logsumexp(logits)^2` a token (ST-MoE, arXiv 2202.08906, equation 5): large scores round badly
    and choose one expert for good. Sums over micro-batches are exact.
    """
    return torch.stack([routing.z_sum for routing in routings]).mean(), routings[0].num_tokens


def expert_load(chosen_NE: torch.Tensor) -> list[list[float]]:
    """Each layer's experts' shares of the choices, adding up to 1 (all 0 without any token).

    Takes int64 `[N, E]`: `Routing.chosen_E` of N layers.
    """
    shares: list[list[float]] = (
        chosen_NE / chosen_NE.sum(dim=1, keepdim=True).clamp(min=1)
    ).tolist()
    return shares
