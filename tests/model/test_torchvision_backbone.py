"""torchvision's classifiers as image encoders, held to their own forward passes."""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from bitgen.config import BitGenConfig
from bitgen.errors import ConfigError, DownloadError, ModelFileError
from bitgen.model.encoders import (
    load_encoder_weights,
    make_image_encoder,
    open_encoder,
    weights_digest,
)
from bitgen.model.torchvision_backbone import TorchvisionBackbone

# One of each family: side of the pictures, and the module that its forward hands the grid to.
FAMILIES = {
    "alexnet": (64, "avgpool"),
    "convnext_tiny": (64, "avgpool"),
    "densenet121": (64, None),
    "efficientnet_b0": (64, "avgpool"),
    "efficientnet_v2_s": (64, "avgpool"),
    "googlenet": (64, "avgpool"),
    "inception_v3": (96, "avgpool"),
    "maxvit_t": (224, "classifier"),
    "mnasnet0_5": (64, None),
    "mobilenet_v2": (64, None),
    "mobilenet_v3_small": (64, "avgpool"),
    "regnet_x_400mf": (64, "avgpool"),
    "regnet_y_400mf": (64, "avgpool"),
    "resnet18": (64, "avgpool"),
    "resnext50_32x4d": (64, "avgpool"),
    "shufflenet_v2_x0_5": (64, None),
    "squeezenet1_1": (64, "classifier"),
    "swin_t": (64, "avgpool"),
    "swin_v2_t": (64, "avgpool"),
    "vgg11": (64, "avgpool"),
    "vgg13_bn": (64, "avgpool"),
    "vit_b_32": (64, None),
    "wide_resnet50_2": (64, "avgpool"),
}
# Families not listed by their first word would be new: then this file has to learn of them.
KNOWN = (
    "alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "maxvit",
    "mnasnet", "mobilenet", "regnet", "resnet", "resnext", "shufflenet", "squeezenet", "swin",
    "vgg", "vit", "wide_resnet",
)  # fmt: skip


HEADS = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2.")


@pytest.fixture(autouse=True)
def no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a hundred million weights takes seconds, and all of them are replaced."""
    for name in dir(nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def outside_model(name: str, size: int = 64) -> nn.Module:
    """torchvision's own, with weights and statistics that all matter; its head is left empty."""
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"transform_input": True, "init_weights": False}
    model: nn.Module = models.get_model(name, weights=None, **options)
    random = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith(HEADS):
                continue
            if parameter.dim() == 1:
                low = 0.8 if key.endswith("weight") else -0.2
                parameter.uniform_(low, low + 0.4, generator=random)
            else:
                bound = math.sqrt(3 / max(3, parameter[0].numel()))
                parameter.uniform_(-bound, bound, generator=random)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2, generator=random)
                module.running_var.uniform_(0.5, 1.5, generator=random)
    return model.eval()


def config_for(name: str, size: int = 64, **changes: Any) -> BitGenConfig:
    return BitGenConfig(image_encoder=name, image_size=size, freeze_encoder=True, **changes)


def grid_of(encoder: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features, weights = encoder.eval()(images)
    assert weights == ()
    return features


def what_is_pooled(model: nn.Module, pool: str | None, images: torch.Tensor) -> torch.Tensor:
    """The grid `[B, P, E]` that torchvision's own forward hands on, caught on its way."""
    caught: list[torch.Tensor] = []
    if pool is not None:
        model.get_submodule(pool).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        with torch.no_grad():
            model(images)
        return caught[0].flatten(2).transpose(1, 2)
    if hasattr(model, "class_token"):
        model.encoder.register_forward_hook(lambda _, __, output: caught.append(output))
        with torch.no_grad():
            model(images)
        return caught[0][:, 1:]
    # The pooling is a function there: the mean over the grid is what its head is given.
    head = model.fc if hasattr(model, "fc") else model.classifier
    head.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(images)
    return caught[0][:, None]


# MaxViT of torchvision 0.17 calls torch.meshgrid in the old way.
@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_grid_is_what_torchvision_hands_to_its_pooling(name: str) -> None:
    size, pool = FAMILIES[name]
    outside = outside_model(name, size)
    encoder = make_image_encoder(config_for(name, size))
    assert isinstance(encoder, TorchvisionBackbone)
    own, state = encoder.backbone.state_dict(), outside.state_dict()
    for key in set(state) - set(own):
        del state[key]
    encoder.backbone.load_state_dict(state)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    grid, expected = grid_of(encoder, images), what_is_pooled(outside, pool, images)
    assert grid.shape == (2, encoder.num_tokens, encoder.output_width)
    if expected.shape[1] == 1:
        grid = grid.mean(dim=1, keepdim=True)
    torch.testing.assert_close(grid, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(grid[0], grid[1])
    assert not any(key.startswith(HEADS) for key in own)


def test_every_family_of_torchvision_is_tested() -> None:
    for name in models.list_models(module=models):
        assert name.startswith(KNOWN), f"{name} is of a family that no test knows"
    assert all(any(name.startswith(word) for name in FAMILIES) for word in KNOWN)


def test_squeezenet_gives_what_its_head_is_given_three_by_three() -> None:
    encoder = make_image_encoder(config_for("squeezenet1_1"))
    assert (encoder.num_tokens, encoder.output_width) == (9, 512)


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("maxvit_t", 160, "--image_size 224"),
        ("vit_b_16", 72, "--image_size 64"),
        ("inception_v3", 32, "larger --image_size"),
        ("resnet999", 64, "resnet50"),
        ("fcn_resnet50", 64, "resnet50"),
    ],
)
def test_an_encoder_that_cannot_be_says_what_can(name: str, size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_image_encoder(config_for(name, size))
    assert name in caught.value.message


# Weights files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pth", "wrapped", "parallel", "safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "mnasnet0_5", "densenet121", "googlenet"])
def test_a_file_of_torchvisions_layout_gives_its_features(
    tmp_path: Path, name: str, form: str
) -> None:
    outside = outside_model(name)
    state: Any = outside.state_dict()  # with its heads
    if name == "densenet121":  # as in the file that torchvision publishes
        old = (
            (k.replace("norm1", "norm.1").replace("conv2", "conv.2"), v) for k, v in state.items()
        )
        state = OrderedDict((k, v) for k, v in old if not k.endswith("num_batches_tracked"))
    path = tmp_path / f"weights.{'safetensors' if form == 'safetensors' else 'pth'}"
    if form == "safetensors":
        save_file(dict(state), path)
    elif form == "wrapped":
        torch.save({"epoch": 3, "model": state}, path)
    elif form == "parallel":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    encoder = make_image_encoder(config_for(name))
    load_encoder_weights(encoder, name, str(path))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = what_is_pooled(outside, FAMILIES[name][1], images)
    grid = grid_of(encoder, images)
    if expected.shape[1] == 1:
        grid = grid.mean(dim=1, keepdim=True)
    torch.testing.assert_close(grid, expected, rtol=1e-5, atol=1e-6)


def test_position_embeddings_of_another_size_are_interpolated_as_torchvision_does() -> None:
    from torchvision.models.vision_transformer import interpolate_embeddings

    outside = outside_model("vit_b_32", 96)
    encoder = make_image_encoder(config_for("vit_b_32", 64))
    assert isinstance(encoder, TorchvisionBackbone)
    fitted = encoder.fitted(outside.state_dict())
    expected = interpolate_embeddings(64, 32, OrderedDict(outside.state_dict()))
    for name, tensor in encoder.backbone.state_dict().items():
        assert fitted[name].shape == tensor.shape
        assert torch.equal(fitted[name], expected[name]), name


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the file ran",))


def test_files_that_are_no_weights_of_this_encoder(tmp_path: Path) -> None:
    encoder = make_image_encoder(config_for("resnet18"))
    before = weights_digest(encoder)
    torch.save(outside_model("mobilenet_v3_small").state_dict(), tmp_path / "other.pth")
    torch.save(outside_model("resnext50_32x4d").state_dict(), tmp_path / "wider.pth")
    torch.save({"weight": Malicious()}, tmp_path / "pickle.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "damaged.pth").write_bytes(b"\x80\x04 no")
    (tmp_path / "damaged.safetensors").write_bytes(b"none")
    for name, words in {
        "other.pth": "does not fit the image encoder resnet18",
        "wider.pth": "another shape",
        "pickle.pth": "not a weights file",
        "list.pth": "holds a list",
        "damaged.pth": "not a weights file",
        "damaged.safetensors": "not a weights file",
    }.items():
        with pytest.raises(ModelFileError, match=words):
            load_encoder_weights(encoder, "resnet18", str(tmp_path / name))
    assert weights_digest(encoder) == before


def test_named_weights_come_from_torch_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torchvision had downloaded them before; what is in its folder is not asked for."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    outside = outside_model("resnet18")
    url = models.ResNet18_Weights.IMAGENET1K_V1.url
    torch.save(outside.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    encoder = make_image_encoder(config_for("resnet18"))
    load_encoder_weights(encoder, "resnet18", "DEFAULT")
    assert torch.equal(encoder.backbone.conv1.weight, outside.conv1.weight)
    with pytest.raises(ConfigError, match="neither a file nor weights") as caught:
        load_encoder_weights(encoder, "resnet18", "IMAGENET22K")
    assert "IMAGENET1K_V1" in str(caught.value.remedy)


def test_a_download_that_fails_names_the_file_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib.error import URLError

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    encoder = make_image_encoder(config_for("mobilenet_v3_small"))
    with pytest.raises(DownloadError, match="no route") as caught:
        load_encoder_weights(encoder, "mobilenet_v3_small", "DEFAULT")
    assert "mobilenet_v3_small-047dcff4.pth" in str(caught.value.remedy)


def test_normalisation_is_that_of_the_weights(tmp_path: Path) -> None:
    imagenet = BitGenConfig().image_mean
    for name, weights, mean, size in (
        ("resnet50", "DEFAULT", imagenet, 224),
        ("efficientnet_v2_l", "DEFAULT", (0.5, 0.5, 0.5), 480),
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", imagenet, 384),
        ("vgg16", "IMAGENET1K_FEATURES", (0.48235, 0.45882, 0.40784), 224),
    ):
        opened = open_encoder(config_for(name), weights)
        assert opened.config.image_mean == mean and opened.image_size == size
    assert opened.config.image_std == (1 / 255,) * 3
    weights_file = tmp_path / "weights.pth"
    weights_file.touch()
    opened = open_encoder(config_for("efficientnet_v2_l"), str(weights_file))
    assert opened.config.image_std == (0.5, 0.5, 0.5)
    assert opened.image_size is None
    assert open_encoder(config_for("efficientnet_v2_l")).config == config_for("efficientnet_v2_l")
    assert open_encoder(BitGenConfig(), "file").config == BitGenConfig()


def test_the_digest_tells_weights_apart() -> None:
    first, second = (make_image_encoder(config_for("mobilenet_v3_small")) for _ in range(2))
    first.backbone.load_state_dict(
        first.fitted(outside_model("mobilenet_v3_small").state_dict()), strict=False
    )
    assert weights_digest(first) != weights_digest(second)
    second.load_state_dict(first.state_dict())
    assert weights_digest(first) == weights_digest(second)
    with torch.no_grad():
        second.backbone.features[0][1].running_mean[0] += 1e-3
    assert weights_digest(first) != weights_digest(second)
