"""What one micro-batch loses: the model and its losses as one module.

Several processes share this module (DistributedDataParallel, FSDP2), so everything that needs
gradients passes through its `forward`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from bitgen.config import BitGenConfig, TrainingConfig
from bitgen.dataset.collate import IGNORED_LABEL, Batch
from bitgen.dataset.images import normalize_images
from bitgen.errors import ConfigError
from bitgen.model.bitgen import BitGenModel, BitGenOutput
from bitgen.training.amp import autocast
from bitgen.training.caption_judge import CaptionJudge
from bitgen.training.losses import (
    caption_loss,
    count_caption_targets,
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
    self_critical_loss,
)
from bitgen.training.self_critical import SampledCaptions, SelfCritic

FIGURES = ("caption", "tokens", "plan", "plan_tokens", "robot", "labels")
"""What `judge` counts: sums of losses, and what to divide them by."""


class Judged(NamedTuple):
    """What `Objective.judge` gives of a batch, on the host."""

    figures: torch.Tensor
    """float64, the `FIGURES`."""
    robot_logits: torch.Tensor | None
    """float32 `[B, R]`; None for a batch without robot tasks."""


class LossSums(NamedTuple):
    """What `Objective.forward` gives."""

    sums: dict[str, torch.Tensor]
    """float32 scalars by the loss's name."""
    chosen_NE: torch.Tensor | None = None
    """int64, how many tokens chose each of E experts in each of N layers."""

    def added_to(self, other: LossSums) -> LossSums:
        """The sums of both."""
        sums = dict(self.sums)
        for name, value in other.sums.items():
            sums[name] = sums[name] + value if name in sums else value
        if self.chosen_NE is None or other.chosen_NE is None:
            return LossSums(sums)
        return LossSums(sums, self.chosen_NE + other.chosen_NE)


class Objective(nn.Module):
    """The losses of a batch, each as a sum; `counts` says what each is divided by."""

    def __init__(
        self,
        model: BitGenModel,
        training: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype,
        num_processes: int = 1,
        is_sharded: bool = False,
        critic: SelfCritic | None = None,
    ) -> None:
        """
        Args:
            model: on the device.
            training: weights of the losses.
            device: where batches are moved.
            dtype: of the forward pass.
            num_processes: that share the update. Of several, each has to have a gradient to give.
            is_sharded: by FSDP2: then all processes run the same layers in each batch (robots are
                scored in batches without tasks too), and give a gradient of every weight.
            critic: of self-critical training.

        Raises:
            ConfigError: word_pretraining_image_size does not fit the image encoder.
        """
        _check_image_size(model.config, training.word_pretraining_image_size)
        super().__init__()
        self.model = model
        self._training = training
        self._device, self._dtype = device, dtype
        self._is_masked = training.objective == "mlm"
        self._num_processes, self._is_sharded = num_processes, is_sharded
        self._critic = critic
        self._is_self_critical = training.objective == "self_critical"
        self.weights = {
            "caption": 1.0,
            "robot": training.robot_loss_weight,
            "image_word": training.image_word_weight,
        }
        self._future_tokens = range(2, model.config.predict_tokens + 1)
        if self._is_self_critical:
            self.weights["caption"] = training.cross_entropy_weight
            self.weights["self_critical"] = 1.0
            self.weights["reward"] = 0.0  # is reported, and has no gradient
            self._future_tokens = range(0)  # what follows in drawn captions is not to be copied
        for ahead in self._future_tokens:
            self.weights[f"future_{ahead}"] = training.future_token_weight
        if model.config.num_experts > 1:
            self.weights["load_balance"] = training.load_balance_weight
            self.weights["router_z"] = training.router_z_weight

    def sample(self, batch: Batch) -> SampledCaptions | None:
        """Captions that self-critical training draws for a batch on the host; else None.

        They depend on torch's random numbers. With several processes each one draws its own: this
        is not a part of `forward`.
        """
        if self._critic is None or not batch.has_pictures:
            return None
        with autocast(self._device, self._dtype):
            return self._critic.sample(self.model, batch, self._pictures(batch.to(self._device)))

    def counts(
        self,
        batches: Sequence[Batch],
        words_only: bool,
        sampled: Sequence[SampledCaptions | None] = (),
    ) -> dict[str, int]:
        """What the losses of these micro-batches, on the host, are divided by.

        `words_only` is that of `forward`, `sampled` what `sample` gave for each.
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
        if self._is_self_critical and not words_only:
            drawn = [captions for captions in sampled if captions is not None]
            counts["caption"] *= self._training.cross_entropy_weight > 0
            counts["sampled_tokens"] = sum(captions.num_tokens for captions in drawn)
            counts["self_critical"] = sum(captions.num_captions for captions in drawn)
            counts["reward"] = counts["self_critical"]
        if "router_z" in self.weights and not words_only:
            num_tokens = sum(
                self._count_routed(batch, captions)
                for batch, captions in itertools.zip_longest(batches, sampled)
            )
            counts["load_balance"] = counts["router_z"] = num_tokens
        return counts

    def _count_routed(self, batch: Batch, sampled: SampledCaptions | None) -> int:
        num_image_tokens = self.model.num_image_tokens if batch.has_pictures else 0
        num_tokens = 0
        if sampled is not None:
            drawn = batch.rows(sampled.rows_B)
            num_tokens = count_routed_tokens(
                sampled.positions_RL >= 0, drawn.image_mask, num_image_tokens
            )
            batch = batch.rows(~sampled.rows_B)
        return num_tokens + count_routed_tokens(
            batch.attention_mask, batch.image_mask, num_image_tokens
        )

    def forward(
        self, batch: Batch, words_only: bool = False, sampled: SampledCaptions | None = None
    ) -> LossSums:
        """Each loss that the batch has labels for, summed.

        Args:
            batch: on the host.
            words_only: the image word loss alone, of the rows that have words; no text is read.
            sampled: what `sample` gave for the batch: these captions have the self-critical loss,
                and its other rows (robot tasks) what they always have.
        """
        if words_only:
            found = self._word_losses(batch)
        elif sampled is None:
            found = self._losses(batch)
        else:
            found = self._self_critical_losses(batch.rows(sampled.rows_B), sampled)
            if not sampled.rows_B.all():
                found = found.added_to(self._losses(batch.rows(~sampled.rows_B)))
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
            sums["robot"], _ = robot_loss(output.robot_logits, batch.robot_labels)
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
        return self._with_routing(sums, output)

    def _self_critical_losses(self, batch: Batch, sampled: SampledCaptions) -> LossSums:
        """Of rows that all have drawn captions: `batch` is on the host."""
        mask = sampled.attention_mask(self.model)
        batch = batch.to(self._device)
        with autocast(self._device, self._dtype):
            output = self.model(
                sampled.input_ids_RL.to(self._device),
                images=self._pictures(batch),
                attention_mask=mask,
                return_image_words=self._training.image_word_weight > 0,
            )
        loss, caption = self_critical_loss(
            output.logits,
            sampled.sources_M.to(self._device),
            sampled.targets_M.to(self._device),
            sampled.advantages_M.to(self._device),
            sampled.is_reference_M.to(self._device),
        )
        sums = {
            "self_critical": loss,
            "reward": torch.tensor(sampled.reward_sum, device=self._device),
        }
        if self._training.cross_entropy_weight > 0:
            sums["caption"] = caption
        if output.image_words is not None:
            sums["image_word"], _ = image_word_loss(
                output.image_words, batch.word_ids, batch.word_weights
            )
        return self._with_routing(sums, output)

    def _with_routing(self, sums: dict[str, torch.Tensor], output: BitGenOutput) -> LossSums:
        if output.routings is None:
            return LossSums(sums)
        sums["load_balance"], _ = load_balancing_loss(output.routings)
        sums["router_z"], _ = router_z_loss(output.routings)
        return LossSums(sums, torch.stack([routing.chosen_E for routing in output.routings]))

    def _word_losses(self, batch: Batch) -> LossSums:
        rows = batch.word_weights.sum(dim=1) > 0
        if not batch.has_pictures or not rows.any():
            return LossSums({})
        batch = batch.rows(rows).to(self._device)
        images = self._pictures(batch)
        size = self._training.word_pretraining_image_size
        if size and batch.images is not None:  # cached features are of the full size
            images = F.interpolate(
                images, (size, size), mode="bilinear", align_corners=False, antialias=True
            )
        share = 1.0  # of each picture in its blend with that of the row before (arXiv 1710.09412)
        if self._training.word_mixup:
            alpha = torch.tensor(self._training.word_mixup)
            share = float(torch.distributions.Beta(alpha, alpha).sample())
            images = torch.lerp(images.roll(1, dims=0), images, share)
        with autocast(self._device, self._dtype):
            scores_BV = self.model.image_words(images)
        loss, _ = image_word_loss(scores_BV, batch.word_ids, batch.word_weights)
        if share < 1:
            others, _ = image_word_loss(
                scores_BV, batch.word_ids.roll(1, dims=0), batch.word_weights.roll(1, dims=0)
            )
            loss = share * loss + (1 - share) * others
        return LossSums({"image_word": loss})

    def _pictures(self, batch: Batch) -> torch.Tensor:
        """What the model is shown of a batch on the device: pictures, normalised, `[B, 3, H, W]`,
        or cached features of them, `[B, P, E]`; float32."""
        if batch.image_features is not None:
            return batch.image_features.float()
        assert batch.images is not None
        config = self.model.config
        return normalize_images(batch.images, config.image_mean, config.image_std)

    @torch.no_grad()
    def judge(self, batch: Batch) -> Judged:
        """Judge a validation batch, without label smoothing."""
        has_plans = bool(batch.is_plan.any())
        output, batch = self._run(batch, is_training=False)
        plans_B1 = batch.is_plan[:, None]
        captions = batch.labels.masked_fill(plans_B1, IGNORED_LABEL) if has_plans else batch.labels
        figures = list(self._text_loss(output.logits, captions))
        if has_plans:
            plans = batch.labels.masked_fill(~plans_B1, IGNORED_LABEL)
            figures += self._text_loss(output.logits, plans)
        else:
            figures += [torch.zeros((), device=self._device)] * 2
        robot_logits = None
        if output.robot_logits is None:
            figures += [torch.zeros((), device=self._device)] * 2
        else:
            figures += robot_loss(output.robot_logits, batch.robot_labels)
            robot_logits = output.robot_logits.float().cpu()
        return Judged(torch.stack([figure.double() for figure in figures]).cpu(), robot_logits)

    def judge_captions(self, judge: CaptionJudge, batch: Batch) -> torch.Tensor:
        """What `CaptionJudge.cider` says of greedy captions of a validation batch."""
        with autocast(self._device, self._dtype):
            return judge.cider(self.model, batch, self._pictures(batch.to(self._device)))

    def _run(self, batch: Batch, is_training: bool) -> tuple[BitGenOutput, Batch]:
        asks_robots = count_robot_labels(batch.robot_labels) > 0
        if self._is_sharded:
            asks_robots = batch.robot_labels.shape[1] > 0
        # Built before the batch is moved: to look for padding would wait for an accelerator.
        mask = self.model.build_attention_mask(
            batch.attention_mask,
            batch.prefix_lengths,
            batch.image_mask,
            has_images=batch.has_pictures,
        )
        batch = batch.to(self._device)
        images = self._pictures(batch) if batch.has_pictures else None
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


def _check_image_size(config: BitGenConfig, size: int) -> None:
    if not size:
        return
    if config.image_encoder != "vit":
        raise ConfigError(
            f"word_pretraining_image_size is for the encoder vit; this one is"
            f" {config.image_encoder}.",
            remedy="Leave it out.",
        )
    if size % config.patch_size:
        raise ConfigError(
            f"word_pretraining_image_size {size} is not a multiple of the patch size"
            f" {config.patch_size}.",
            remedy=f"Take {max(1, round(size / config.patch_size)) * config.patch_size}.",
        )
