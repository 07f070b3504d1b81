"""The state of an interrupted training run, as safetensors: everything that decides how it goes on."""

import json
import math
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from uadtool.errors import UadtoolError
from uadtool.files import atomic_write, refuse_newer

KEY = "uadtool-checkpoint"
SCHEMA = "uadtool.checkpoint/1"


def save_checkpoint(path: Path, config: dict[str, Any], progress: dict[str, Any], model: nn.Module,
                    best: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, whole or not at all. ``config`` is what a run that resumes must have in common."""
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
    """The progress and all tensors that a checkpoint holds, for ``restore``.

    Raises:
        UadtoolError: the file is no checkpoint, of a newer uadtool, or of a run with another ``config``.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            before, progress = read_header(file.metadata(), str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
    except (OSError, SafetensorError, ValueError) as error:
        raise UadtoolError(f"{path} is not a checkpoint of uadtool: {error}; remove it to start anew") from error
    config = json.loads(json.dumps(config))  # so that tuples compare as the lists they became
    changed = [name for name in config if before.get(name) != config[name]]
    if changed:
        name = changed[0]
        raise UadtoolError(f"{path} is of a run with {name} {before.get(name)!r:.200}, this one has "
                           f"{config[name]!r:.200}; use the same, or start anew without --resume")
    return progress, tensors


def restore(found: tuple[dict[str, Any], dict[str, Tensor]], model: nn.Module,
            optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore model and optimizer, in place, from what ``read_checkpoint`` found; returns (progress, best).

    Raises:
        UadtoolError: the tensors are not those of this model and optimizer.
    """
    progress, tensors = found

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}

    state, best = optimizer.state_dict(), part("best.")
    state["state"] = {}
    try:
        for name, value in part("optimizer.").items():
            index, entry = name.split(".")
            state["state"].setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict(state)
        if progress["best_loss"] != math.inf:  # there is no best one before the first evaluation
            model.load_state_dict(best)
        model.load_state_dict(part("model."))
    except (KeyError, RuntimeError, ValueError) as error:
        raise UadtoolError("the tensors of the checkpoint are not those of this run; remove it to start anew"
                           ) from error
    return progress, best


def read_header(metadata: Optional[dict[str, str]], source: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The ``config`` and the ``progress`` that ``save_checkpoint`` wrote into the header of the file ``source``.

    Raises:
        ValueError: they are not there.
        UadtoolError: they are of a newer uadtool.
    """
    try:
        header = json.loads((metadata or {})[KEY])
        refuse_newer(header["schema"], SCHEMA, source)
        config, progress = header["config"], header["progress"]
        kinds = [type(progress[name]) for name in ("step", "best_step", "best_loss")]
    except (KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"its header lacks {error}") from error
    if not isinstance(config, dict) or kinds != [int, int, float]:
        raise ValueError("its header is not that of one")
    return config, progress
