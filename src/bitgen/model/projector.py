"""Maps image features to the decoder's width: one image token a feature."""

from __future__ import annotations

import torch
from torch import nn

from bitgen.model.norm import RMSNorm
from bitgen.model.ternary import make_linear


class Projector(nn.Module):
    """Two linear layers with a squared ReLU between, `[B, P, encoder width] -> [B, P, C]`."""

    def __init__(self, encoder_width: int, hidden_size: int, quantization: str, eps: float) -> None:
        super().__init__()
        self.input_norm = RMSNorm(encoder_width, eps)
        self.up_proj = make_linear(encoder_width, hidden_size, quantization)
        self.sub_norm = RMSNorm(hidden_size, eps)
        self.down_proj = make_linear(hidden_size, hidden_size, quantization)

    def forward(self, features_BPE: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up_proj(self.input_norm(features_BPE))).square()
        tokens_BPC: torch.Tensor = self.down_proj(self.sub_norm(hidden))
        return tokens_BPC
