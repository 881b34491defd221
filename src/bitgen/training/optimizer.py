"""AdamW with weight decay where it belongs, and its state as named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from bitgen.errors import ModelFileError
from bitgen.model.experts import MixtureOfExperts
from bitgen.training.distributed import cut_like, whole

_BETAS = (0.9, 0.95)
_PREFIX = "optimizer."
_ENCODER = "image_encoder."


def decayed_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable weights that decay, by name: matrices and convolutions, nothing else.

    Biases, norm gains, embeddings, learned positions and learned tokens do not decay, nor do the
    routers of experts: decay would draw them to choosing no expert over another, and the router's
    z-loss keeps their scores small already.
    """
    exempt = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for parameter in module.parameters(recurse=False)
    }
    exempt |= {
        id(module.router.weight)
        for module in model.modules()
        if isinstance(module, MixtureOfExperts)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.ndim >= 2
        and name.endswith("weight")
        and id(parameter) not in exempt
    }


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    encoder_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in one fused kernel where torch has it.

    Betas (0.9, 0.95) are those of the BitNet b1.58 recipe (arXiv 2402.17764, training tips).

    Args:
        model: whose parameters are updated.
        learning_rate: of all of them.
        weight_decay: of those that decay.
        encoder_learning_rate: of the image encoder; None: that of the rest. Schedules scale both
            alike.
    """
    factor = 1.0 if encoder_learning_rate is None else encoder_learning_rate / learning_rate
    decayed = decayed_parameters(model)
    groups: list[dict[str, Any]] = []
    for rate_factor in dict.fromkeys((1.0, factor)):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and (name in decayed) is decays
                and (factor if name.startswith(_ENCODER) else 1.0) == rate_factor
            ]
            groups.append(
                {
                    "params": parameters,
                    "lr": rate_factor * learning_rate,
                    "weight_decay": weight_decay if decays else 0.0,
                    "decays": decays,
                    "rate_factor": rate_factor,
                }
            )
    groups = [group for group in groups if group["params"]]
    try:
        # AdamW writes `fused` into the groups it is given, also when it then refuses them.
        copies = [dict(group) for group in groups]
        return torch.optim.AdamW(copies, lr=learning_rate, betas=_BETAS, fused=True)
    except RuntimeError:  # this torch has no fused AdamW for this device (a CPU before torch 2.4)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=_BETAS)


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """The learning rate of all parameters, and the weight decay of those that decay.

    An image encoder with a rate of its own gets the same share of `learning_rate` as at the start.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["rate_factor"] * learning_rate
        if group["decays"]:
            group["weight_decay"] = weight_decay


def _ordered_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Parameter names in the order in which the optimizer numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `optimizer.PARAMETER:SLOT` tensors, for safetensors.

    Of sharded weights the pieces are put together, for which every process has to ask.
    """
    names = _ordered_names(optimizer, model)
    return {
        f"{_PREFIX}{names[index]}:{slot}": whole(value)
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises ModelFileError where the state belongs to other parameters or shapes.
    """
    names = _ordered_names(optimizer, model)
    parameters = dict(model.named_parameters())
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(_PREFIX):
            continue
        name, _, slot = key[len(_PREFIX) :].rpartition(":")
        if name not in index_of:
            raise ModelFileError(
                f"The optimizer state holds {name!r}, which this model does not train.",
                remedy="Resume with the settings that the run was started with.",
            )
        if value.ndim and value.shape != parameters[name].shape:
            raise ModelFileError(
                f"The optimizer state of {name!r} has shape {list(value.shape)}; the weight has"
                f" {list(parameters[name].shape)}."
            )
        state.setdefault(index_of[name], {})[slot] = (
            cut_like(value, parameters[name]) if value.ndim else value
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
