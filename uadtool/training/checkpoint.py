"""The state of an interrupted training run, as safetensors: everything that decides how it goes on."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from uadtool.artifacts import atomic_write
from uadtool.errors import UadtoolError

KEY = "uadtool-checkpoint"


def save_checkpoint(path: Path, config: dict[str, Any], progress: dict[str, Any], model: nn.Module,
                    best: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, whole or not at all. ``config`` is what a run that resumes must have in common."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    header = {KEY: json.dumps({"config": config, "progress": progress})}
    with atomic_write(path) as temporary:
        save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
                  temporary, metadata=header)


def load_checkpoint(path: Path, config: dict[str, Any], model: nn.Module,
                    optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore model and optimizer, in place; returns (progress, best).

    Raises:
        UadtoolError: the file is no checkpoint, or of a run with another ``config``.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UadtoolError(f"{path} is not a checkpoint of uadtool: {error}; remove it to start anew") from error
    config = json.loads(json.dumps(config))  # so that tuples compare as the lists they became
    changed = [name for name in config if header["config"].get(name) != config[name]]
    if changed:
        name = changed[0]
        raise UadtoolError(f"{path} is of a run with {name} {header['config'].get(name)!r}, this one has "
                           f"{config[name]!r}; use the same, or start anew without --resume")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model."))
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in part("optimizer.").items():
        index, entry = name.split(".")
        state["state"].setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict(state)
    return header["progress"], part("best.")
