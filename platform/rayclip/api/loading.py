"""From the name of a model to the model, ready to use."""

import os
from pathlib import Path

import torch

from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.inference.encoder import Encoder
from rayclip.inference.model import Model
from rayclip.io.s3 import StorageError
from rayclip.io.storage import absolute, is_remote
from rayclip.tracking.model_uri import is_registered
from rayclip.tracking.registry import find_by_name, resolve_model
from rayclip.training.checkpoint import load_model


def load(
    model: str | os.PathLike[str],
    device: str | torch.device | None = None,
    *,
    tracking_uri: str | None = None,
) -> Model:
    """Load a trained model.

    Args:
        model: what the model is called or where it is: a registered model ("models:/NAME@ALIAS",
            "models:/NAME/VERSION", or its bare NAME where that has one alias, or one version), a checkpoint's folder,
            or exported weights (a folder of rayclip, open_clip or Hugging Face, or a file with a state dict). A path
            that exists is taken as one. Folders may be in S3.
        device: "cpu", "cuda", "cuda:1" or another of torch's. None: a GPU where there is one, else the CPU.
        tracking_uri: the MLflow that registered models are in. None: the database ./mlflow/mlflow.db.

    Returns:
        The model in eval mode, with its tokenizer and its preprocessing.

    Raises:
        UserError: there is no such model, or it is damaged, or there is no such device.
    """
    chosen = _device(device)
    uri = find_model(os.fspath(model), tracking_uri)
    try:
        source = resolve_model(uri, tracking_uri)
        clip = load_model(source.folder)
    except StorageError as error:
        raise UserError(str(error)) from None
    pinned = f"models:/{source.version}" if is_registered(uri) else absolute(uri)
    encoder = Encoder(clip, get_tokenizer(clip.context_length), chosen)
    return Model(encoder, source.name, source.version, pinned, tracking_uri)


def find_model(model: str, tracking_uri: str | None) -> str:
    """Return the URI or the path of a model; a bare name is looked up in MLflow where there is no path of that name.

    Raises UserError where there is neither.
    """
    is_path = is_remote(model) or "/" in model or os.sep in model or Path(model).exists()
    return model if is_path or is_registered(model) else find_by_name(model, tracking_uri)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts that it has it
        reason = (str(error).strip().splitlines() or ["torch cannot use it"])[0]
        raise UserError(f"device '{device}' is not there: {reason}") from None
    return chosen
