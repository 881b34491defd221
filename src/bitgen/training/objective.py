"""What one micro-batch loses: the model and its losses as one module.

Several processes share this module (DistributedDataParallel, FSDP2), so everything that needs
gradients passes through its `forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from bitgen.config import TrainingConfig
from bitgen.dataset.collate import Batch
from bitgen.dataset.images import normalize_images
from bitgen.model.bitgen import BitGenModel, BitGenOutput
from bitgen.training.amp import autocast
from bitgen.training.losses import (
    caption_loss,
    count_caption_targets,
    count_exact_matches,
    count_future_targets,
    count_image_words,
    count_masked_targets,
    count_robot_labels,
    count_routed_tokens,
    future_token_loss,
    image_word_loss,
    load_balancing_loss,
    masked_token_loss,
    robot_loss,
    router_z_loss,
)

FIGURES = ("caption", "tokens", "robot", "labels", "matches", "tasks")
"""What `judge` gives: sums of losses, what to divide them by, and exact matches of tasks."""


class LossSums(NamedTuple):
    """What `Objective.forward` gives."""

    sums: dict[str, torch.Tensor]
    """float32 scalars by the loss's name."""
    chosen_NE: torch.Tensor | None = None
    """int64, how many tokens chose each of E experts in each of N layers."""


class Objective(nn.Module):
    """The losses of a batch, each as a sum; `counts` says what each is divided by."""

    def __init__(
        self,
        model: BitGenModel,
        training: TrainingConfig,
        positive_weight_R: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
        num_processes: int = 1,
        is_sharded: bool = False,
    ) -> None:
        """
        Args:
            model: on the device.
            training: weights of the losses.
            positive_weight_R: of the robot loss.
            device: where batches are moved.
            dtype: of the forward pass.
            num_processes: that share the update. Of several, each has to have a gradient to give.
            is_sharded: by FSDP2: then all processes run the same layers in each batch (robots are
                scored in batches without tasks too), and give a gradient of every weight.
        """
        super().__init__()
        self.model = model
        self._training = training
        self._positive_weight_R = positive_weight_R.to(device)
        self._device, self._dtype = device, dtype
        self._is_masked = training.objective == "mlm"
        self._num_processes, self._is_sharded = num_processes, is_sharded
        self.weights = {
            "caption": 1.0,
            "robot": training.robot_loss_weight,
            "image_word": training.image_word_weight,
        }
        self._future_tokens = range(2, model.config.predict_tokens + 1)
        for ahead in self._future_tokens:
            self.weights[f"future_{ahead}"] = training.future_token_weight
        if model.config.num_experts > 1:
            self.weights["load_balance"] = training.load_balance_weight
            self.weights["router_z"] = training.router_z_weight

    def counts(self, batches: Sequence[Batch], words_only: bool) -> dict[str, int]:
        """What the losses of these micro-batches, on the host, are divided by.

        `words_only` is that of `forward`.
        """
        counts = {"image_word": sum(count_image_words(batch.word_weights) for batch in batches)}
        if not words_only:
            count = count_masked_targets if self._is_masked else count_caption_targets
            counts["caption"] = sum(count(batch.labels) for batch in batches)
            counts["robot"] = sum(count_robot_labels(batch.robot_labels) for batch in batches)
            for ahead in self._future_tokens:
                counts[f"future_{ahead}"] = sum(
                    count_future_targets(batch.labels, ahead) for batch in batches
                )
        if "router_z" in self.weights and not words_only:
            num_tokens = sum(self._count_routed(batch) for batch in batches)
            counts["load_balance"] = counts["router_z"] = num_tokens
        return counts

    def _count_routed(self, batch: Batch) -> int:
        num_image_tokens = 0 if batch.images is None else self.model.num_image_tokens
        return count_routed_tokens(batch.attention_mask, batch.image_mask, num_image_tokens)

    def forward(self, batch: Batch, words_only: bool = False) -> LossSums:
        """Each loss that the batch has labels for, summed.

        Args:
            batch: on the host.
            words_only: the image word loss alone, of the rows that have words; no text is read.
        """
        found = self._word_losses(batch) if words_only else self._losses(batch)
        if self._is_sharded or (self._num_processes > 1 and not found.sums):
            found.sums["nothing"] = self._nothing()
        return found

    def total(self, sums: Mapping[str, torch.Tensor], counts: Mapping[str, int]) -> torch.Tensor:
        """What is minimised: each loss by its weight, divided by its count in the whole update."""
        total = torch.zeros((), device=self._device)
        for name, loss_sum in sums.items():
            total = total + self.weights.get(name, 1.0) * loss_sum / max(1, counts.get(name, 1))
        return total

    def _nothing(self) -> torch.Tensor:
        """Zero, with a gradient of zeros for the weights outside of the decoder's layers."""
        layers = {id(p) for p in self.model.text_decoder.layers.parameters()}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in layers]
        return torch.stack([p.sum() for p in others]).sum() * 0.0

    def _text_loss(
        self, logits_BLV: torch.Tensor, labels_BL: torch.Tensor, label_smoothing: float = 0.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = masked_token_loss if self._is_masked else caption_loss
        return loss(logits_BLV, labels_BL, label_smoothing)

    def _losses(self, batch: Batch) -> LossSums:
        output, batch = self._run(batch, is_training=True)
        smoothing = self._training.label_smoothing
        sums = {"caption": self._text_loss(output.logits, batch.labels, smoothing)[0]}
        if output.robot_logits is not None:
            sums["robot"], _ = robot_loss(
                output.robot_logits, batch.robot_labels, self._positive_weight_R
            )
        if output.image_words is not None:
            sums["image_word"], _ = image_word_loss(
                output.image_words, batch.word_ids, batch.word_weights
            )
        if self._future_tokens:
            with autocast(self._device, self._dtype):
                for ahead, states_BLC in zip(
                    self._future_tokens, output.future_states or (), strict=True
                ):
                    sums[f"future_{ahead}"], _ = future_token_loss(
                        states_BLC,
                        batch.labels,
                        ahead,
                        self.model.text_decoder.lm_head,
                        smoothing,
                    )
        if output.routings is None:
            return LossSums(sums)
        sums["load_balance"], _ = load_balancing_loss(output.routings)
        sums["router_z"], _ = router_z_loss(output.routings)
        return LossSums(sums, torch.stack([routing.chosen_E for routing in output.routings]))

    def _word_losses(self, batch: Batch) -> LossSums:
        rows = batch.word_weights.sum(dim=1) > 0
        if batch.images is None or not rows.any():
            return LossSums({})
        batch = batch.rows(rows).to(self._device)
        assert batch.images is not None
        config = self.model.config
        images = normalize_images(batch.images, config.image_mean, config.image_std)
        with autocast(self._device, self._dtype):
            scores_BV = self.model.image_words(images)
        loss, _ = image_word_loss(scores_BV, batch.word_ids, batch.word_weights)
        return LossSums({"image_word": loss})

    @torch.no_grad()
    def judge(self, batch: Batch) -> torch.Tensor:
        """The `FIGURES` of a validation batch, float64 on the host; no label smoothing."""
        output, batch = self._run(batch, is_training=False)
        figures = list(self._text_loss(output.logits, batch.labels))
        if output.robot_logits is None:
            figures += [torch.zeros((), device=self._device)] * 4
        else:
            labels = batch.robot_labels
            figures += robot_loss(output.robot_logits, labels, self._positive_weight_R)
            figures += count_exact_matches(output.robot_logits, labels)
        return torch.stack([figure.double() for figure in figures]).cpu()

    def _run(self, batch: Batch, is_training: bool) -> tuple[BitGenOutput, Batch]:
        asks_robots = count_robot_labels(batch.robot_labels) > 0
        if self._is_sharded:
            asks_robots = batch.robot_labels.shape[1] > 0
        # Built before the batch is moved: to look for padding would wait for an accelerator.
        mask = self.model.build_attention_mask(
            batch.attention_mask,
            batch.prefix_lengths,
            batch.image_mask,
            has_images=batch.images is not None,
        )
        batch = batch.to(self._device)
        config = self.model.config
        images = batch.images
        if images is not None:
            images = normalize_images(images, config.image_mean, config.image_std)
        with autocast(self._device, self._dtype):
            output = self.model(
                batch.input_ids,
                images=images,
                attention_mask=mask,
                return_robot_selection=asks_robots,
                return_image_words=is_training and self._training.image_word_weight > 0,
                return_future_tokens=is_training and bool(self._future_tokens),
            )
        return output, batch
