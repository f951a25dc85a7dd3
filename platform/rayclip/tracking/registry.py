"""Checkpoints as MLflow's logged models, the best of them as a registered version with an alias, and the way back:
from what people call a model to a folder with its weights."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelOutput
from mlflow.entities.logged_model_status import LoggedModelStatus
from mlflow.exceptions import MlflowException
from safetensors import SafetensorError, safe_open

from rayclip.errors import UserError, first_line, nearest
from rayclip.io.files import SETTINGS_BESIDE, find_weights
from rayclip.io.paths import StoragePath
from rayclip.io.storage import download, is_remote, join, list_files, split
from rayclip.tracking.mlflow import connect_existing, log_once, resolve_uri
from rayclip.tracking.model_uri import FORMS, REGISTERED, is_registered
from rayclip.tracking.names import flatten

MODEL_FILES = ("model.safetensors", "config.json", "metrics.json")
"""What a served model needs of a checkpoint."""

_BESIDE = ("metrics.json", "ema.safetensors")
"""What more is fetched of a checkpoint where it is there."""


def link_checkpoint(
    client: MlflowClient, run_id: str, checkpoint: StoragePath, step: int, metrics: Mapping[str, Any]
) -> LoggedModel:
    """The logged model of a checkpoint: made where the run has none for that step. Only a pointer, no copy.

    What was measured later than it was made is added.
    """
    run = client.get_run(run_id)
    name = f"{run.info.run_name}-{step:012}"
    known = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"name = '{name}' AND source_run_id = '{run_id}'"
    )
    points = {f"checkpoint/{key}": value for key, value in flatten(metrics).items()}
    if known and known[0].status == LoggedModelStatus.READY:
        log_once(client, run_id, points, step, known[0].model_id)
        return known[0]
    # One that is not ready was being made when a crash came.
    model = (
        known[0]
        if known
        else client.create_logged_model(
            run.info.experiment_id,
            name=name,
            source_run_id=run_id,
            tags={"checkpoint": str(checkpoint), "samples_seen": str(step)},
            model_type="clip",
        )
    )
    outputs = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in {output.model_id for output in outputs}:  # MLflow refuses what a run has already
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    log_once(client, run_id, points, step, model.model_id)
    return client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def register(client: MlflowClient, model: LoggedModel, checkpoint: StoragePath, name: str, ema: bool = False) -> int:
    """Make a checkpoint a version of the registered model `name`, and return its number.

    `ema` makes the moving average of its weights the version's weights.

    The version holds a copy of its own, so that it outlives the run's checkpoints. A checkpoint that is a version
    already stays the one it is.
    """
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.source == f"models:/{model.model_id}":
            return int(version.version)
    with tempfile.TemporaryDirectory() as scratch:
        for file in MODEL_FILES:
            averaged = ema and file == "model.safetensors"
            # An artifact is called what its file is called.
            found, named = checkpoint / ("ema.safetensors" if averaged else file), Path(scratch) / file
            named.symlink_to(found.absolute()) if isinstance(found, Path) else download(str(found), named)
            client.log_model_artifact(model.model_id, str(named))
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    source = f"models:/{model.model_id}"
    version = client.create_model_version(name, source, run_id=model.source_run_id, model_id=model.model_id)
    return int(version.version)


def move_alias(client: MlflowClient, name: str, alias: str, number: int) -> None:
    """Point the alias at a version, and keep in a tag where it was: that is what `roll_back` goes back to."""
    before = client.get_registered_model(name).aliases.get(alias)
    if before is not None and int(before) != number:
        client.set_registered_model_tag(name, f"{alias}.before", before)
    client.set_registered_model_alias(name, alias, str(number))


def roll_back(uri: str, to: int | None, tracking_uri: str | None) -> tuple[int, int]:
    """Point models:/NAME@ALIAS at version `to`, or at the one it had before; a running service follows.

    Where nobody kept which one that was, it is the one below. Returns both numbers, old and new. Raises UserError.
    """
    match = REGISTERED.fullmatch(uri)
    if match is None or match["alias"] is None:
        raise UserError(f"'{uri}' names no alias: give models:/NAME@ALIAS")
    name, alias = match["name"], match["alias"]
    now = find_version(uri, tracking_uri).number
    client = connect_existing(resolve_uri(tracking_uri))
    if to is None:
        kept = client.get_registered_model(name).tags.get(f"{alias}.before")
        numbers = [int(version.version) for version in client.search_model_versions(f"name = '{name}'")]
        below = [number for number in numbers if number < now]
        if kept is not None and int(kept) in numbers and int(kept) != now:
            to = int(kept)
        elif below:
            to = max(below)
        else:
            raise UserError(f"'{uri}' is at version {now} and there is none before it: give to=VERSION")
    find_version(f"models:/{name}/{to}", tracking_uri)
    # Without a note of where it was: rolled back again, it goes further back and not to what was left.
    client.set_registered_model_alias(name, alias, str(to))
    return now, to


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded. `version` is what every answer names; `folder` holds MODEL_FILES or a checkpoint, or
    it is exported weights: a folder, or one file.
    """

    name: str
    version: str
    folder: Path


class Version(NamedTuple):
    """A registered version. `source` is of that version alone, also where a database is made anew."""

    name: str
    number: int
    source: str

    def __str__(self) -> str:
        return f"{self.name}/{self.number}"


def resolve_model(uri: str, tracking_uri: str | None) -> ModelSource:
    """The model that `uri` names: models:/NAME@ALIAS, models:/NAME/VERSION, a checkpoint's folder, or
    exported weights (a folder, or one file); those in S3 are copied to this machine once.

    Raises UserError for one that is not there or not whole, and where MLflow is needed and does not answer.
    """
    if is_registered(uri):
        return fetch(find_version(uri, tracking_uri), tracking_uri)
    return _checkpoint(uri, _copied(uri) if is_remote(uri) else Path(uri).absolute())


def find_by_name(name: str, tracking_uri: str | None) -> str:
    """Return the URI of a registered model that is given by its bare name: its only alias, or its only version.

    Raises UserError for an unknown name, one with several aliases, and where MLflow does not answer.
    """
    tracking_uri = resolve_uri(tracking_uri)
    client = connect_existing(tracking_uri)
    try:
        names = [model.name for model in client.search_registered_models()]
        if name not in names:
            known = f"; {nearest(name, names)}" if names else ""
            raise UserError(f"no model '{name}': no such path, nor such a registered model in {tracking_uri}{known}")
        aliases = sorted(client.get_registered_model(name).aliases)
        numbers = sorted(int(version.version) for version in client.search_model_versions(f"name = '{name}'"))
    except MlflowException as error:
        raise UserError(f"MLflow cannot be read at {tracking_uri}: {first_line(error)}") from None
    if len(aliases) == 1:
        return f"models:/{name}@{aliases[0]}"
    if not aliases and len(numbers) == 1:
        return f"models:/{name}/{numbers[0]}"
    choices = [f"models:/{name}@{alias}" for alias in aliases] or [f"models:/{name}/{number}" for number in numbers]
    raise UserError(f"'{name}' may be several models: give one of {', '.join(choices) or 'its versions; it has none'}")


def find_version(uri: str, tracking_uri: str | None) -> Version:
    """The version that a registered model's URI stands for now: milliseconds, one look at MLflow, no download.

    Raises UserError for an unknown name, alias or number, and where MLflow does not answer.
    """
    match = REGISTERED.fullmatch(uri)
    if match is None:
        raise UserError(f"'{uri}' names no registered model: {FORMS}")
    name, alias, number = match.group("name", "alias", "number")
    tracking_uri = resolve_uri(tracking_uri)
    client = connect_existing(tracking_uri)
    try:
        if alias is not None:
            found = client.get_model_version_by_alias(name, alias)
        else:
            found = client.get_model_version(name, number)
    except MlflowException as error:
        raise UserError(_why_not(client, tracking_uri, name, alias, number, error)) from None
    return Version(name, int(found.version), f"{found.source} {found.creation_timestamp}")


def fetch(version: Version, tracking_uri: str | None) -> ModelSource:
    """A registered version's files in a folder of this machine, downloaded where they are not there yet.

    The folder is under $RAYCLIP_CACHE, or ~/.cache/rayclip. It gets its name when it is whole, so any number of
    processes may do this at once. Raises UserError where the download fails or is not a model.
    """
    tracking_uri = resolve_uri(tracking_uri)
    folder = _cache_folder(version, tracking_uri)
    if not all((folder / file).is_file() for file in MODEL_FILES):
        _download(version, tracking_uri, folder)
    return ModelSource(version.name, str(version), folder)


def _why_not(
    client: MlflowClient, tracking_uri: str, name: str, alias: str | None, number: str | None, error: MlflowException
) -> str:
    """What is wrong with a name, an alias or a number that MLflow refused."""
    try:
        names = [model.name for model in client.search_registered_models()]
        if name not in names:
            known = nearest(name, names) if names else "none is registered there"
            return f"no registered model '{name}' in {tracking_uri}: {known}"
        if alias is not None:
            aliases = ", ".join(sorted(client.get_registered_model(name).aliases)) or "none"
            return f"model '{name}' has no alias '{alias}' in {tracking_uri}; it has: {aliases}"
        numbers = sorted(int(v.version) for v in client.search_model_versions(f"name = '{name}'"))
        if int(number or 0) not in numbers:
            last = f"; the last is {numbers[-1]}" if numbers else ""
            return f"model '{name}' has no version {number} in {tracking_uri}{last}"
    except MlflowException as second:
        error = second
    return f"MLflow cannot be read at {tracking_uri}: {first_line(error)}"


def _cache() -> Path:
    return Path(os.environ.get("RAYCLIP_CACHE") or Path.home() / ".cache" / "rayclip").absolute()


def _cache_folder(version: Version, tracking_uri: str) -> Path:
    # A database that is deleted and made anew has a version 1 of the same name, and another source.
    key = hashlib.sha256(f"{tracking_uri}\n{version.source}".encode()).hexdigest()[:12]
    return _cache() / "models" / f"{quote(version.name, safe='')}-{version.number}-{key}"


def _download(version: Version, tracking_uri: str, folder: Path) -> None:
    # A sibling of its own: the rename must stay on one file system.
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        client = connect_existing(tracking_uri)
        where = client.get_model_version_download_uri(version.name, str(version.number))
        got = Path(mlflow.artifacts.download_artifacts(where, dst_path=str(partial / "got"), tracking_uri=tracking_uri))
        _check_files(got, f"version {version} in {tracking_uri}")
        shutil.rmtree(folder, ignore_errors=True)  # what someone has taken a file out of
        got.rename(folder)
    except (MlflowException, OSError) as error:
        if not all((folder / file).is_file() for file in MODEL_FILES):  # else another process was faster
            raise UserError(f"version {version} cannot be fetched from {tracking_uri}: {first_line(error)}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copied(address: str) -> Path:
    """What a model needs of the files at an address in a store, on this machine; copied anew once they have changed.

    Raises UserError where there is no model, or it cannot be reached.
    """
    try:
        files = {file.name: file for file in list_files(address.rstrip("/"))}
        weights = next((name for name in ("", *SETTINGS_BESIDE) if name in files), None)
        if weights is None:
            wanted = " or ".join(SETTINGS_BESIDE)
            raise UserError(f"no model at '{address}': it has no {wanted}; {FORMS}")
        names = [name for name in (weights, SETTINGS_BESIDE.get(weights), *_BESIDE) if name in files]
        key = hashlib.sha256(json.dumps([address, *(files[name] for name in names)]).encode()).hexdigest()[:12]
        target = _cache() / "copies" / key / split(address.rstrip("/"))[1]
        for name in reversed(names):  # the weights last, by which the others count
            path = target / name
            if not path.is_file():
                download(join(address.rstrip("/"), name), path)
        return target
    except OSError as error:
        raise UserError(f"'{address}' cannot be fetched: {first_line(error)}") from None


def _checkpoint(path: str, folder: Path) -> ModelSource:
    if not folder.exists():
        raise UserError(f"no model at '{path}': the folder does not exist; {FORMS}")
    weights = find_weights(folder) or folder / "model.safetensors"
    name = None
    if folder.is_dir():  # else it is one file with a state dict
        settings = SETTINGS_BESIDE[weights.name]
        _check_files(folder, f"'{path}'", (weights.name, settings))
        name = _name(folder / settings, path)
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelSource(str(name or folder.name), f"{folder.name}@{digest[:8]}", folder)


def _name(settings: Path, path: str) -> object:
    try:
        return json.loads(settings.read_text()).get("name")
    except (OSError, ValueError, AttributeError):
        raise UserError(f"'{path}' is no checkpoint: its {settings.name} cannot be read") from None


def _check_files(folder: Path, what: str, files: tuple[str, ...] = MODEL_FILES) -> None:
    """Raise UserError where a file of the model is missing, or its weights are not whole."""
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        within = sorted([*folder.glob("*/model.safetensors"), *folder.glob("checkpoints/*/model.safetensors")])
        hint = f"; did you mean '{os.path.relpath(within[-1].parent)}'?" if within else ""
        raise UserError(f"{what} is no checkpoint: it has no {' and no '.join(missing)}{hint}")
    weights = files[0]
    if not weights.endswith(".safetensors"):
        return
    try:
        # Reads the header alone, and holds it against the file's length.
        with safe_open(folder / weights, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} is damaged: {weights} cannot be read: {first_line(error)}") from None
