"""Weights in and out: our checkpoints, open_clip's folders, Hugging Face's CLIPModel, and bare state dicts (OpenAI's).

What a path holds is told by its content. Nothing that is read is ever run: safetensors, or torch.load with
`weights_only`, or the tensors alone of a TorchScript archive.

    rayclip       config.json with our model, model.safetensors
    open_clip     open_clip_config.json, open_clip_model.safetensors or open_clip_pytorch_model.bin
    huggingface   config.json of model type clip, model.safetensors or pytorch_model.bin
    state dict    one file of any name, with OpenAI's names (which are open_clip's and ours) or Hugging Face's
"""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rayclip.config import ModelConfig
from rayclip.errors import UserError, first_line
from rayclip.io.files import SETTINGS_BESIDE, describe_impostor, find_weights, whole_folder
from rayclip.io.lease import hold
from rayclip.io.paths import StoragePath
from rayclip.models import huggingface, open_clip
from rayclip.models.architecture import Tensors, check_fit, fit, infer
from rayclip.models.clip import CLIP
from rayclip.models.torchscript import is_archive, read_archive

_OPENAI_ONLY = ("input_resolution", "context_length", "vocab_size")
"""Numbers in OpenAI's state dicts that are no weights."""


@dataclass(frozen=True)
class Weights:
    """A model as files hold it. `tensors` are CLIP's state dict, in float32; `format` is what they were read from."""

    config: ModelConfig
    tensors: Tensors
    format: str

    def model(self) -> CLIP:
        """The model, on the CPU."""
        model = CLIP(self.config)
        model.load_state_dict(self.tensors)
        return model


def read_weights(path: str | Path, like: ModelConfig | None = None) -> Weights:
    """Read a checkpoint's folder, an exported folder, or a file with a state dict.

    Where nothing beside a state dict says what model it is of, its shapes do; heads and activation, which they leave
    open, are those of `like` if it has these shapes, else of a preset that has, with GELU (QuickGELU for OpenAI's).

    Raises:
        UserError: there is no model there, or one that is damaged or that our towers cannot be.
    """
    path = Path(path)
    if path.is_file():
        return _read_bare(path, like)
    file = find_weights(path) or path / "model.safetensors"
    settings_path = path / SETTINGS_BESIDE[file.name]
    settings = _read_settings(settings_path)
    with _in_file(settings_path):
        if "model_cfg" in settings:
            kind, (quick_gelu, heads) = "open_clip", open_clip.read_settings(settings)
        elif settings.get("model_type") == "clip":
            kind, (quick_gelu, heads) = "huggingface", huggingface.read_settings(settings)
        else:
            return _read_ours(file, settings)
    with _in_file(file):
        tensors = _our_names(read_tensors(file))
        config = infer(tensors, quick_gelu, heads)
        check_fit(config, tensors)
    return Weights(config, tensors, kind)


def write_weights(folder: StoragePath, weights: Weights, kind: str, name: str) -> None:
    """Write a folder that others load, whole and then named.

    Args:
        folder: must not exist.
        weights: the model.
        kind: rayclip, open_clip or huggingface.
        name: what the model is called, in rayclip's config.json.

    Raises:
        UserError: the folder exists, or the format cannot hold the model.
    """
    tensors = weights.tensors
    if kind == "huggingface":
        settings, tensors = huggingface.write_settings(weights.config), huggingface.to_huggingface(tensors)
    elif kind == "open_clip":
        settings = open_clip.write_settings(weights.config)
    else:
        settings = {"name": name, "model": weights.config.model_dump(mode="json")}
    file_name = "open_clip_model.safetensors" if kind == "open_clip" else "model.safetensors"
    with hold(folder.parent / f"{folder.name}.writing", f"the output '{folder}'"):
        if folder.exists():
            raise UserError(f"'{folder}' exists: give another output, or remove it")
        with whole_folder(folder, last=file_name) as partial:
            # Transformers takes no file that does not say which library it is of.
            save_file(
                {key: t.contiguous() for key, t in tensors.items()}, partial / file_name, metadata={"format": "pt"}
            )
            (partial / SETTINGS_BESIDE[file_name]).write_text(json.dumps(settings, indent=2) + "\n")


def fit_weights(path: str | Path, wanted: ModelConfig) -> Tensors:
    """Weights that a model `wanted` can start from: position embeddings are made to fit its size of picture.

    Raises UserError where there are none, or those of another model.
    """
    weights = read_weights(path, like=wanted)
    with _in_file(Path(path)):
        return fit(weights.tensors, weights.config, wanted)


def read_tensors(file: Path) -> Tensors:
    """A state dict, floating numbers as float32, from safetensors or from what torch.save wrote, told by content.

    Raises UserError for a file that is neither, or is cut off, or would run code.
    """
    _refuse_impostor(file)
    try:
        content = _load(file)
    except pickle.UnpicklingError:  # torch's own words for it tell people to let the file run its code
        reason = "it is neither safetensors nor a state dict, or it holds more than tensors"
        raise UserError(f"'{file}' does not hold the model's weights: {reason}") from None
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"'{file}' does not hold the model's weights: {first_line(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # as open_clip's training writes it
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"'{file}' does not hold the model's weights: it is no state dict")
    wrapped = all(name.startswith("module.") for name in content)
    broken = [name for name, t in content.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise UserError(
            f"'{file}': {len(broken):,} of {len(content):,} tensors hold what is no finite number, as '{broken[0]}': "
            "the training that they come from had diverged"
        )
    return {
        name.removeprefix("module.") if wrapped else name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in content.items()
    }


def _refuse_impostor(file: Path) -> None:
    """Raise UserError for a git-lfs pointer or an HTML page in the place of weights."""
    try:
        with file.open("rb") as opened:
            instead = describe_impostor(opened.read(256))
    except OSError:  # which is said where it is read
        return
    if instead:
        raise UserError(f"'{file}' does not hold the model's weights: it is {instead}")


def _load(file: Path) -> object:
    with file.open("rb") as opened:
        if opened.read(9)[8:] == b"{":
            return load_file(file)
        if is_archive(file):
            return read_archive(file)
        opened.seek(0)
        # Not by its path: by the end of that torch.load would choose the format.
        return torch.load(opened, map_location="cpu", weights_only=True)


def _read_ours(file: Path, settings: dict[str, Any]) -> Weights:
    try:
        config = ModelConfig.model_validate(settings["model"])
    except (KeyError, ValidationError):
        raise UserError("it describes no model") from None
    tensors = read_tensors(file)
    try:
        check_fit(config, tensors)
    except UserError as error:
        raise UserError(f"'{file}' does not hold the model's weights: {error}") from None
    return Weights(config, tensors, "rayclip")


def _read_bare(file: Path, like: ModelConfig | None) -> Weights:
    tensors = read_tensors(file)
    # OpenAI's state dicts hold numbers that are no weights; theirs are QuickGELU.
    of_openai = [tensors.pop(name, None) is not None for name in _OPENAI_ONLY]
    with _in_file(file):
        tensors = _our_names(tensors)
        config = infer(tensors, True if any(of_openai) else None, like=like)
        check_fit(config, tensors)
    return Weights(config, tensors, "state dict")


def _our_names(tensors: Tensors) -> Tensors:
    return huggingface.from_huggingface(tensors) if huggingface.is_huggingface(tensors) else tensors


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"'{path.parent}' is not a checkpoint: no readable {path.name} in it")
    return settings


@contextmanager
def _in_file(file: Path) -> Iterator[None]:
    """Say of a mistake where it is."""
    try:
        yield
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith("'") else f"'{file}': {message}") from None
