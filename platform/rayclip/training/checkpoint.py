"""A checkpoint: one folder that holds all a run needs to go on, and all a reader needs to use the model.

    model.safetensors       weights
    ema.safetensors         their moving average, where the run keeps one
    optimizer.safetensors   both moments and the step count of every parameter, and torch's random state
    state.json              what has been trained on: samples seen, the ledger, what was skipped; by which code
    config.json             the resolved config of the run
    metrics.json            what was measured when it was written

It is written under another name and renamed when it is whole. No pickle anywhere.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from rayclip.errors import UserError, first_line
from rayclip.io.paths import StoragePath
from rayclip.models.clip import CLIP
from rayclip.models.weights import read_tensors, read_weights
from rayclip.training.ema import Ema

_RANDOM_STATE = "torch_random_state"


@dataclass
class RunState:
    """How far a run is. `ledger` and `skipped` cover exactly the samples that the weights have seen."""

    samples_seen: int = 0
    steps: int = 0
    train_time_s: float = 0.0
    data_wait_s: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    interventions: int = 0
    recent_losses: list[float] = field(default_factory=list)
    ledger: dict[str, object] = field(default_factory=lambda: {"cursor": 0, "partial": {}})
    manifest_digest: str = ""
    code_version: str = ""
    device: str = ""
    generation: int = 0
    """Which start of the run saved it: 1 is the first, each that goes on has one more. 0: an older version's."""
    branched_at: int = 0
    """Samples seen by the run that this one went on from; its times and rates count from there."""

    @property
    def samples_consumed(self) -> int:
        """Samples that came, whether they could be read or not: what durations count."""
        return self.samples_seen + sum(self.skipped.values())

    def branch(self) -> "RunState":
        """The same state as another run's first: the time that it took was not that run's."""
        return replace(self, branched_at=self.samples_seen, train_time_s=0.0, data_wait_s=0.0)


def write_checkpoint(
    folder: Path,
    model: CLIP,
    optimizer: Optimizer,
    state: RunState,
    config: dict[str, Any],
    metrics: dict[str, Any],
    ema: Ema | None = None,
) -> None:
    """Write a checkpoint folder, whole and then named; one of that name is replaced."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _save_weights(model.state_dict(), partial / "model.safetensors")
    if ema is not None:
        _save_weights(ema.state_dict(), partial / "ema.safetensors")
    save_file(_optimizer_tensors(model, optimizer), partial / "optimizer.safetensors")
    for name, content in (("state", vars(state)), ("config", config), ("metrics", metrics)):
        (partial / f"{name}.json").write_text(json.dumps(content, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_state(folder: StoragePath) -> RunState:
    """How far the run was. Raises UserError where the folder is no checkpoint."""
    return RunState(**_read_json(folder, "state"))


def read_config(folder: StoragePath) -> dict[str, Any]:
    """The resolved config that the run had. Raises UserError where the folder is no checkpoint."""
    return _read_json(folder, "config")


def read_metrics(folder: StoragePath) -> dict[str, Any]:
    """What was measured at this checkpoint. Raises UserError where the folder is no checkpoint."""
    return _read_json(folder, "metrics")


def restore(folder: Path, model: CLIP, optimizer: Optimizer, ema: Ema | None = None) -> RunState:
    """Load weights, optimizer, random state and average in place, and say how far the run was."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    if ema is not None:
        ema.load_state_dict(load_file(folder / "ema.safetensors"))
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop(_RANDOM_STATE))
    moments: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, slot = key.rpartition("|")
        moments.setdefault(name, {})[slot] = tensor
    for name, parameter in model.named_parameters():
        if name in moments:
            # The step count too: the fused update reads it on the parameter's device.
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in moments[name].items()}
    return read_state(folder)


def load_model(folder: str | Path, ema: bool = False) -> CLIP:
    """The model of a checkpoint, or of exported weights (models/weights.py), on the CPU.

    `ema` asks for the moving average of a checkpoint's weights. Raises UserError where there is none, or a damaged one.
    """
    folder = Path(folder)
    model = read_weights(folder).model()
    if ema:
        path = folder / "ema.safetensors"
        if not path.exists():
            raise UserError(f"'{folder}' has no {path.name}: its run kept no moving average, see the setting ema")
        try:
            model.load_state_dict(read_tensors(path))
        except RuntimeError as error:
            raise UserError(f"'{path}' does not hold the model's weights: {first_line(error)}") from None
    return model


def _save_weights(weights: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


def _optimizer_tensors(model: CLIP, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {_RANDOM_STATE: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
            tensors[f"{name}|{slot}"] = value.contiguous()
    return tensors


def _read_json(folder: StoragePath, name: str) -> dict[str, Any]:
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise UserError(f"'{folder}' is not a checkpoint: no readable {path.name} in it") from None
