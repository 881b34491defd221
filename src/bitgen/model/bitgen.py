"""The model: image encoder, projector, text decoder and robot selector.

    images B3HW -> ImageEncoder -> Projector -> P image tokens --.
    input_ids BL -> embedding --------------------------- L ------+-> S tokens -> decoder
                     -> lm head (tied)                 -> logits BLV
                     -> future token heads, lm head    -> drafts of tokens t+2 ... t+n
                     -> masked pooling -> selector     -> robot_logits BR

Shape letters: B batch, L text length, P image tokens, S = P + L, C width, H heads, V vocabulary,
R robots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bitgen.config import CAPTION_IDF, BitGenConfig
from bitgen.errors import ConfigError, ModelFileError
from bitgen.kernels.matmul import int8_product_is_faster
from bitgen.model.cache import AttentionCache, CacheShape, SlidingWindowCache, StaticCache
from bitgen.model.compilation import require_compiler
from bitgen.model.encoders import make_image_encoder, with_versions
from bitgen.model.experts import Routing
from bitgen.model.fixed_cache import FixedCache
from bitgen.model.future_tokens import FutureTokenHeads
from bitgen.model.image_encoder import GhostBatchNorm
from bitgen.model.layers import TransformerLayer
from bitgen.model.masks import AttentionMask, token_positions
from bitgen.model.projector import Projector
from bitgen.model.robot_selector import RobotSelector
from bitgen.model.text_decoder import TextDecoder


@dataclass(frozen=True)
class BitGenOutput:
    """What `BitGenModel.forward` returns; what was not asked for is None.

    Attributes:
        logits: `[B, L, V]`, next-token scores at each text position.
        states: `[B, L, C]`, the final states of the text positions, normalised: what `logits` are
            read from.
        robot_logits: `[B, R]` float32, in the order of `set_robots`.
        attention_cache: the cache that was given, filled.
        attentions: one `[B, H, S, K]` float32 tensor a decoder layer (K are all slots of a sliding
            window cache that has moved on).
        pooled: `[B, C]`, mean of the final states over the text tokens.
        image_words: `[B, V]`, which words the image tokens alone foretell.
        image_attentions: one `[B, H, P, P]` float32 tensor a layer of the vit encoder, zeros in a
            row whose picture is padding; empty for encoders without attention of ours.
        routings: how each decoder layer routed the image and text tokens to its experts, in
            training and as analysis data; None for a model without experts. The robots' texts,
            which are the same in every call, are not counted.
        future_states: one `[B, L, C]` tensor for each token t+2 ... t+n that position t predicts
            beyond the next, given the true tokens in between; `text_decoder.lm_head` of those rows
            that are wanted gives their scores.
    """

    logits: torch.Tensor
    states: torch.Tensor
    robot_logits: torch.Tensor | None = None
    attention_cache: AttentionCache | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    pooled: torch.Tensor | None = None
    image_words: torch.Tensor | None = None
    image_attentions: tuple[torch.Tensor, ...] | None = None
    routings: tuple[Routing, ...] | None = None
    future_states: tuple[torch.Tensor, ...] | None = None


class BitGenModel(nn.Module):
    """A vision-language model with ternary linear weights, and a robot selector on top."""

    def __init__(self, config: BitGenConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = make_image_encoder(config)
        self.projector = Projector(
            self.image_encoder.output_width,
            config.hidden_size,
            config.quantization,
            config.rms_norm_eps,
        )
        self.text_decoder = TextDecoder(config)
        self.robot_selector = RobotSelector(config)
        # Made last: the other weights start as without them.
        self.future_heads = FutureTokenHeads(config)
        # Counted before training and not trained: by it captions are compared
        # (bitgen.inference.consensus).
        self.caption_idf: torch.Tensor
        if config.caption_idf:
            self.register_buffer(CAPTION_IDF, torch.zeros(config.vocab_size, dtype=torch.float16))
        self.num_image_tokens: int = self.image_encoder.num_tokens
        self._robot_names: tuple[str, ...] = ()
        self._robot_tokens: tuple[torch.Tensor, torch.Tensor] | None = None
        self._encoded_robots_RC: torch.Tensor | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        images: torch.Tensor | None = None,
        attention_mask: torch.Tensor | AttentionMask | None = None,
        return_robot_selection: bool = False,
        attention_cache: AttentionCache | None = None,
        return_analysis_data: bool = False,
        return_image_words: bool = False,
        return_future_tokens: bool = False,
    ) -> BitGenOutput:
        """Next-token logits and, where asked for, robot logits and analysis data.

        Args:
            input_ids: int64 `[B, L]`.
            images: float `[B, 3, H, W]`, normalised; their P tokens stand before the text. Or
                features of pictures, `[B, P, E]`, as `encode_features` gives them: of a frozen
                encoder they are the same in every call.
            attention_mask: `[B, L]`, `[B, 1, L]` or `[B, 1, 1, L]` (1 = token), a 4-D mask over
                text or over image and text, or an `AttentionMask` over all S positions; None = all
                are tokens. With a cache an `AttentionMask` states the rules of the whole sequence,
                and is given at every step. One that was placed by `at_positions` says where tokens
                stand: several continuations of one prefix then share one row.
            return_robot_selection: score the robots of `set_robots`.
            attention_cache: from `new_cache` or `new_sliding_window_cache`; later calls then give
                new tokens only.
            return_analysis_data: return attention weights and pooled states.
            return_image_words: score the vocabulary by the mean of the image tokens.
            return_future_tokens: return the states that predict tokens beyond the next.

        Raises:
            ValueError: shapes that do not fit, longer than `max_positions`, a cache in
                bidirectional mode, or robots asked for before `set_robots`.
        """
        batch, text_length = input_ids.shape
        length = text_length + (0 if images is None else self.num_image_tokens)
        mask = self._full_mask(attention_mask, batch, text_length, length)
        valid_BS = mask.known_padding
        if valid_BS is not None:
            valid_BS = valid_BS[:, -length:]
        text_BLC = self.text_decoder.embed_tokens(input_ids)
        x_BSC = text_BLC
        image_words_BV = image_attentions = None
        if images is not None:
            image_BPC, image_attentions = self._encode_present(
                images, valid_BS, return_analysis_data
            )
            x_BSC = torch.cat([image_BPC.to(x_BSC.dtype), x_BSC], dim=1)
            if return_image_words:
                image_words_BV = self._words_of(image_BPC)
        mask, positions_BS = self._place(mask, valid_BS, attention_cache, batch, length)
        hidden_BSC, attentions, routings = self.text_decoder(
            x_BSC,
            mask,
            positions_BS.to(x_BSC.device),
            attention_cache,
            return_analysis_data,
            valid_BS,
        )
        if attention_cache is not None:
            attention_cache.end_step(length)
        hidden_BLC = hidden_BSC[:, length - text_length :]
        robot_logits = pooled_BC = None
        if return_robot_selection or return_analysis_data:
            pooled_BC = _pool(
                hidden_BLC, None if valid_BS is None else valid_BS[:, length - text_length :]
            )
        if return_robot_selection:
            assert pooled_BC is not None
            robot_logits = self.robot_selector(pooled_BC, self.encode_robots(), self._robot_names)
        future_states = None
        if return_future_tokens:
            future_states = self.future_heads(hidden_BLC, text_BLC, self.text_decoder.norm)
        return BitGenOutput(
            logits=self.text_decoder.lm_head(hidden_BLC),
            states=hidden_BLC,
            robot_logits=robot_logits,
            attention_cache=attention_cache,
            attentions=attentions if return_analysis_data else None,
            pooled=pooled_BC if return_analysis_data else None,
            image_words=image_words_BV,
            image_attentions=image_attentions,
            routings=routings if routings and (self.training or return_analysis_data) else None,
            future_states=future_states,
        )

    def future_state(
        self, index: int, state_BC: torch.Tensor, tokens_B: torch.Tensor
    ) -> torch.Tensor:
        """The state `[B, C]` that predicts one token more than `state_BC` does.

        Args:
            index: which head; 0 takes the last of `BitGenOutput.states` and foretells t+2.
            state_BC: normalised, of the head before.
            tokens_B: int64, the token that `state_BC` was taken to predict.
        """
        embedding_BC = self.text_decoder.embed_tokens(tokens_B)
        return self.future_heads.step(index, state_BC, embedding_BC, self.text_decoder.norm)

    def drop_future_heads(self) -> None:
        """Become the model that predicts the next token alone, with the same answers."""
        self.config = replace(self.config, predict_tokens=1)
        self.future_heads = FutureTokenHeads(self.config)

    def _place(
        self,
        mask: AttentionMask,
        valid_BS: torch.Tensor | None,
        cache: AttentionCache | None,
        batch: int,
        length: int,
    ) -> tuple[AttentionMask, torch.Tensor]:
        """The mask over all keys of this call, and rotary positions int64 `[B or 1, S]`."""
        past = 0 if cache is None else cache.length
        placed_BS = mask.query_positions
        last = past + length if placed_BS is None else int(placed_BS.max()) + 1
        if last > self.config.max_positions and not isinstance(cache, SlidingWindowCache):
            raise ValueError(
                f"The sequence has {last} positions; this model was made for"
                f" {self.config.max_positions} (max_positions)."
            )
        if cache is None:
            return mask, _rotary_positions(valid_BS, length) if placed_BS is None else placed_BS
        if self.config.attention_mode == "bidirectional":
            raise ValueError(
                "attention_mode is bidirectional: a later token changes every earlier state,"
                " so nothing can be cached."
            )
        return cache.begin_step(mask, batch, length)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Image tokens `[B, P, C]` of normalised pictures `[B, 3, H, W]`, or of their features.

        Raises:
            ValueError: pictures of another shape than the config's.
        """
        return self._encode(images, return_weights=False)[0]

    def encode_features(self, images_B3HW: torch.Tensor) -> torch.Tensor:
        """What the image encoder says of normalised pictures `[B, 3, H, W]`: `[B, P, E]`.

        Raises:
            ValueError: pictures of another shape than the config's.
        """
        self._check_images(images_B3HW)
        return self.image_encoder(images_B3HW)[0]

    def _encode(
        self, visual: torch.Tensor, return_weights: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Image tokens of pictures `[B, 3, H, W]`, with each encoder layer's attention weights if
        asked for; or of their features `[B, P, E]`."""
        if visual.dim() == 3:
            expected = (self.num_image_tokens, self.image_encoder.output_width)
            if visual.shape[1:] != expected:
                raise ValueError(
                    f"Expected image features [B, {expected[0]}, {expected[1]}], got"
                    f" {tuple(visual.shape)}."
                )
            # Cached in half precision; computed in the precision that the encoder would give.
            return self.projector(visual.to(self.text_decoder.norm.weight.dtype)), ()
        self._check_images(visual)
        features_BPE, weights = self.image_encoder(visual, return_weights=return_weights)
        return self.projector(features_BPE), weights

    def _check_images(self, images_B3HW: torch.Tensor) -> None:
        size = self.config.image_size
        if images_B3HW.dim() != 4 or images_B3HW.shape[1:] != (3, size, size):
            raise ValueError(
                f"Expected images [B, 3, {size}, {size}], got {tuple(images_B3HW.shape)}."
            )

    def image_words(self, images: torch.Tensor) -> torch.Tensor:
        """Which words pictures `[B, 3, H, W]`, or features of them `[B, P, E]`, alone foretell:
        scores `[B, V]`.

        Of the encoder `vit` the pictures may have any size that is a multiple of the patch size.
        """
        if images.dim() == 3:
            return self._words_of(self.encode_images(images))
        features_BPE, _ = self.image_encoder(images)
        return self._words_of(self.projector(features_BPE))

    def _words_of(self, image_BPC: torch.Tensor) -> torch.Tensor:
        return self.text_decoder.lm_head(self.text_decoder.norm(image_BPC.mean(dim=1)))

    def _encode_present(
        self, visual: torch.Tensor, valid_BS: torch.Tensor | None, return_weights: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Image tokens `[B, P, C]`; a row whose image tokens are padding is not encoded.

        So a blank picture has no part in the statistics that training normalises by.
        """
        if valid_BS is None or bool(valid_BS[:, 0].all()):
            tokens_BPC, weights = self._encode(visual, return_weights)
            return tokens_BPC, weights if return_weights else None
        batch, device = len(visual), visual.device
        rows = valid_BS[:, 0].nonzero().squeeze(1).to(device)
        shape = (batch, self.num_image_tokens, self.config.hidden_size)
        if not len(rows):
            return visual.new_zeros(shape), () if return_weights else None
        encoded, weights = self._encode(visual.index_select(0, rows), return_weights)
        tokens_BPC = encoded.new_zeros(shape).index_copy(0, rows, encoded)
        if not return_weights:
            return tokens_BPC, None
        return tokens_BPC, tuple(
            layer.new_zeros(batch, *layer.shape[1:]).index_copy(0, rows, layer) for layer in weights
        )

    def build_attention_mask(
        self,
        attention_mask_BL: torch.Tensor,
        prefix_lengths_B: torch.Tensor | None = None,
        image_mask_B: torch.Tensor | None = None,
        has_images: bool = True,
    ) -> AttentionMask:
        """The mask over image and text tokens that the config's attention mode asks for.

        Args:
            attention_mask_BL: bool or 0/1, 1 = token; padding may stand on either side.
            prefix_lengths_B: text tokens of each row (not counting padding) that belong to the
                prefix; None = none.
            image_mask_B: False where a row has no picture: its image tokens are padding.
            has_images: whether image tokens stand before the text at all.
        """
        valid_BS = attention_mask_BL.bool()
        num_images = self.num_image_tokens if has_images else 0
        num_images_B: torch.Tensor | int = num_images
        if num_images:
            batch = valid_BS.shape[0]
            if image_mask_B is None:
                image_mask_B = valid_BS.new_ones(batch)
            else:
                num_images_B = image_mask_B.long() * num_images
            images_BP = image_mask_B.bool()[:, None].expand(batch, num_images)
            valid_BS = torch.cat([images_BP, valid_BS], dim=1)
        padding = AttentionMask.padding(valid_BS)
        if self.config.attention_mode == "bidirectional":
            return padding
        if self.config.attention_mode == "causal" or not (
            num_images or prefix_lengths_B is not None
        ):
            return AttentionMask.causal() & padding
        if prefix_lengths_B is not None:
            num_images_B = prefix_lengths_B + num_images_B
        return AttentionMask.prefix(num_images_B) & padding

    def set_robots(
        self,
        names: Sequence[str],
        input_ids_RL: torch.Tensor,
        attention_mask_RL: torch.Tensor,
    ) -> None:
        """The catalog to choose from: each robot's name and tokenized text.

        Raises:
            ValueError: not one row of tokens a name.
        """
        if len(names) != input_ids_RL.shape[0] or input_ids_RL.shape != attention_mask_RL.shape:
            raise ValueError(
                f"{len(names)} robot names need as many rows of tokens; got"
                f" {tuple(input_ids_RL.shape)} and mask {tuple(attention_mask_RL.shape)}."
            )
        self._robot_names = tuple(names)
        self._robot_tokens = (input_ids_RL, attention_mask_RL.bool())
        self._encoded_robots_RC = None

    def encode_robots(self) -> torch.Tensor:
        """Pooled states `[R, C]` of the catalog's texts; kept between calls without gradient.

        Raises:
            ValueError: no catalog was set.
        """
        if self._robot_tokens is None:
            raise ValueError("No robots to choose from: call set_robots first.")
        if self._encoded_robots_RC is not None and not self.training:
            return self._encoded_robots_RC
        input_ids_RL, valid_RL = self._robot_tokens
        device = self.text_decoder.norm.weight.device
        hidden_RLC, _, _ = self.text_decoder(
            self.text_decoder.embed_tokens(input_ids_RL.to(device)),
            AttentionMask.padding(valid_RL),
            _rotary_positions(valid_RL, valid_RL.shape[1]).to(device),
            valid_BS=valid_RL,
        )
        pooled_RC = _pool(hidden_RLC, valid_RL)
        if not self.training and not torch.is_grad_enabled():
            self._encoded_robots_RC = pooled_RC
        return pooled_RC

    def new_cache(self, batch_size: int, max_length: int) -> StaticCache:
        """An empty cache for `batch_size` rows of up to `max_length` image and text tokens."""
        return StaticCache(self._cache_shape(batch_size), max_length)

    def new_sliding_window_cache(
        self, batch_size: int, window: int, sinks: int = 0
    ) -> SlidingWindowCache:
        """An empty cache for endless rows: the first `sinks` tokens and the last `window`.

        Raises ValueError for window < 1, sinks < 0, or more than `max_positions` of both.
        """
        shape, config = self._cache_shape(batch_size), self.config
        return SlidingWindowCache(shape, window, sinks, config.max_positions, config.rope_theta)

    def new_fixed_cache(self, batch_size: int, max_length: int) -> FixedCache:
        """An empty cache for `batch_size` rows of up to `max_length` tokens whose steps are all
        alike, to be recorded."""
        return FixedCache(self._cache_shape(batch_size), max_length)

    def _cache_shape(self, batch_size: int) -> CacheShape:
        norm = self.text_decoder.norm.weight
        return CacheShape(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            device=norm.device,
            dtype=norm.dtype,
        )

    def text_tower_state_dict(self) -> dict[str, torch.Tensor]:
        """The decoder's weights, named as transformers' `BitNetForCausalLM` names them.

        Raises:
            ConfigError: the model has experts, which `BitNetForCausalLM` has not.
            ValueError: the model is packed, and holds no float weights any more.
        """
        if self.config.num_experts > 1:
            raise ConfigError(
                f"This model has {self.config.num_experts} experts a layer; transformers'"
                " BitNetForCausalLM has none, so their text towers cannot be exchanged.",
                remedy="Take a model with num_experts 1.",
            )
        state = self.text_decoder.state_dict()
        if any(name.endswith((".packed", ".tiles")) for name in state):
            raise ValueError("A packed model has no float weights; load the run with packed=False.")
        tower = {f"model.{name}": tensor for name, tensor in state.items()}
        tower["lm_head.weight"] = tower["model.embed_tokens.weight"]  # tied
        return tower

    def load_text_tower(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load the decoder's weights from a state dict of transformers' `BitNetForCausalLM`.

        Args:
            state_dict: `model.embed_tokens.weight`, `model.layers.0...`, `model.norm.weight` and,
                if it is there, `lm_head.weight`, which must equal the embedding: ours is tied.

        Raises:
            ConfigError: this model has experts.
            ModelFileError: names are missing or foreign, shapes differ, the head is not tied, or
                weights are packed.
        """
        expected = self.text_tower_state_dict()
        given = dict(state_dict)
        given.setdefault("lm_head.weight", given.get("model.embed_tokens.weight", torch.empty(0)))
        missing, foreign = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
        if missing or foreign:
            raise ModelFileError(
                f"The text tower has {len(missing)} tensors missing"
                f" (first: {(missing or ['none'])[0]}) and {len(foreign)} that it does not know"
                f" (first: {(foreign or ['none'])[0]}).",
                remedy="Give the state dict of a BitNetForCausalLM with float weights and as many"
                " layers.",
            )
        for name, tensor in expected.items():
            if given[name].shape != tensor.shape:
                raise ModelFileError(
                    f"{name} has shape {tuple(given[name].shape)}; expected {tuple(tensor.shape)}.",
                    remedy="Make the config with the same widths, heads and vocabulary.",
                )
            if not given[name].is_floating_point():
                raise ModelFileError(
                    f"{name} holds {given[name].dtype}: packed weights.",
                    remedy="Give float weights (the bf16 release of the model).",
                )
        if not torch.equal(given["lm_head.weight"], given["model.embed_tokens.weight"]):
            raise ModelFileError(
                "lm_head.weight differs from model.embed_tokens.weight; this decoder ties them.",
                remedy="Give a model with tie_word_embeddings.",
            )
        self._encoded_robots_RC = None
        self.text_decoder.load_state_dict(
            {
                name.removeprefix("model."): tensor
                for name, tensor in given.items()
                if name != "lm_head.weight"
            }
        )

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """In training, recompute each decoder and vit layer in the backward pass, or not.

        Only the layers' inputs are then kept, for one more forward pass (arXiv 1604.06174). The
        numbers are the same, dropout included. Encoders of others keep all they compute.
        """
        for module in self.modules():
            if isinstance(module, TransformerLayer):
                module.is_recomputed = enabled

    def set_norm_batch(self, num_pictures: int) -> None:
        """In training, how many pictures the stem of vit takes means and variances of together."""
        for module in self.modules():
            if isinstance(module, GhostBatchNorm):
                module.group_size = num_pictures

    def compile_layers(self) -> None:
        """Have training run every transformer layer, of text and picture, compiled.

        The graphs are made in the first steps that need them. Evaluation stays as it is, and so do
        the names of the weights. Layers with experts are not compiled: how many tokens an expert
        takes is not known before.

        Raises:
            ConfigError: there is no compiler, or this torch is too old.
        """
        require_compiler(self.text_decoder.norm.weight.device)
        int8_product_is_faster()
        for module in self.modules():
            if isinstance(module, TransformerLayer):
                module.compile_training()

    def train(self, mode: bool = True) -> BitGenModel:
        """As `nn.Module.train`; robot states of earlier weights are forgotten."""
        self._encoded_robots_RC = None
        super().train(mode)
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`; robot states of earlier weights are forgotten."""
        self._encoded_robots_RC = None
        state = with_versions(self, state_dict)
        return super().load_state_dict(state, strict=strict, assign=assign)

    def _full_mask(
        self,
        attention_mask: torch.Tensor | AttentionMask | None,
        batch: int,
        text_length: int,
        length: int,
    ) -> AttentionMask:
        if isinstance(attention_mask, AttentionMask):
            return attention_mask
        has_images = length > text_length
        if attention_mask is None:
            ones_BL = torch.ones(batch, text_length, dtype=torch.bool)
            return self.build_attention_mask(ones_BL, has_images=has_images)
        mask = AttentionMask.from_tensor(attention_mask)
        if mask.valid_BK is not None:
            if mask.valid_BK.shape not in ((batch, text_length), (1, text_length)):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; expected"
                    f" {(batch, text_length)} for input_ids of that shape (with a cache: of the new"
                    " tokens alone)."
                )
            valid_BL = mask.valid_BK.expand(batch, -1)
            return self.build_attention_mask(valid_BL, has_images=has_images)
        if has_images and attention_mask.shape[-1] == text_length:
            return AttentionMask.custom(_extend_over_images(mask.custom_masks[0], length))
        return mask


def _extend_over_images(custom: torch.Tensor, length: int) -> torch.Tensor:
    """A text mask `[B, H, L, L]` as `[B, H, S, S]`: text sees all of the picture."""
    text_length = custom.shape[-1]
    num_images = length - text_length
    allowed, forbidden = (
        (True, False) if custom.dtype == torch.bool else (0.0, float("-inf"))
    )  # an additive mask allows by adding nothing
    extended = custom.new_full((*custom.shape[:2], length, length), allowed)
    extended[:, :, :num_images, num_images:] = forbidden
    extended[:, :, num_images:, num_images:] = custom
    return extended


def _rotary_positions(valid_BS: torch.Tensor | None, length: int) -> torch.Tensor:
    """Rotary positions, int64 `[B or 1, S]`: tokens are counted, padding is not."""
    if valid_BS is None:
        return torch.arange(length)[None]
    return token_positions(valid_BS).clamp(min=0)


def _pool(hidden_BLC: torch.Tensor, valid_BL: torch.Tensor | None) -> torch.Tensor:
    """Mean of `[B, L, C]` over the tokens of each row, float32 `[B, C]`; padding counts nothing."""
    if valid_BL is None:
        return hidden_BLC.float().mean(dim=1)
    weights_BL1 = valid_BL.to(hidden_BLC.device)[..., None].float()
    return (hidden_BLC.float() * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1).clamp(min=1)
