"""The state of an interrupted training run, as safetensors: everything needed to continue it exactly."""

import json
import math
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write
from uadtool.schemas.json_files import refuse_newer
from uadtool.schemas.validation import validate

KEY = "uadtool-checkpoint"
SCHEMA = "uadtool.checkpoint/1"


def save_checkpoint(path: Path, config: dict[str, Any], progress: dict[str, Any], model: nn.Module,
                    best: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint atomically. A run that resumes must have the same ``config``."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    header = {KEY: json.dumps({"schema": SCHEMA, "config": config, "progress": progress})}
    content = save({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
                   metadata=header)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def read_checkpoint(path: Path, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The progress and the tensors of a checkpoint, for ``restore``.

    Raises:
        UadtoolError: the file is not a checkpoint, was written by a newer uadtool, or belongs to a run with another
            ``config``.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            saved_config, progress = read_header(file.metadata(), str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is not a dict
    except (OSError, SafetensorError, ValueError) as error:
        raise UadtoolError(f"{path} is not a checkpoint of uadtool: {error}; remove it to start anew") from error
    config = json.loads(json.dumps(config))  # turns tuples into lists, as in the file
    for name, value in config.items():
        if saved_config.get(name) != value:
            if name == "images":
                raise UadtoolError(f"{path} belongs to a run with other images: some have been added, removed or "
                                   "renamed since; start anew without --resume")
            raise UadtoolError(f"{path} belongs to a run with {name} {saved_config.get(name)!r:.200}, this run has "
                               f"{value!r:.200}; use the same, or start anew without --resume")
    return progress, tensors


def restore(checkpoint: tuple[dict[str, Any], dict[str, Tensor]], model: nn.Module,
            optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore model and optimizer, in place, from the result of ``read_checkpoint``; returns (progress, best).

    Raises:
        UadtoolError: the tensors do not fit this model and optimizer.
    """
    progress, tensors = checkpoint

    def with_prefix(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}

    state, best = optimizer.state_dict(), with_prefix("best.")
    state["state"] = {}
    try:
        for name, value in with_prefix("optimizer.").items():
            index, entry = name.split(".")
            state["state"].setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict(state)
        if progress["best_loss"] != math.inf:  # before the first evaluation no best state exists
            model.load_state_dict(best)
        model.load_state_dict(with_prefix("model."))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UadtoolError("the tensors of the checkpoint do not fit this run; remove it to start anew") from error
    return progress, best


def read_header(metadata: Optional[dict[str, str]], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``config`` and the ``progress`` in the header of the checkpoint ``source`` (schemas/checkpoint.json).

    Raises:
        ValueError: the header is missing or damaged.
        UadtoolError: a newer uadtool wrote it.
    """
    try:
        header = json.loads((metadata or {}).get(KEY, "{}"))
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if isinstance(header, dict):
        refuse_newer(header.get("schema"), SCHEMA, source)
    validate(header, "checkpoint")
    if not isinstance(header["progress"]["best_loss"], float):
        raise ValueError("its progress.best_loss must be a number")
    return header["config"], header["progress"]
