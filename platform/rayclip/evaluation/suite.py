"""A suite: data sets and what is measured on each, from its YAML and the entries in datasets.yaml.

An entry knows what the paper says of a data set (split, metric, number of classes); the data bring their class names
and, where they have some, templates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rayclip.config import DataSetConfig, RetrievalTask, SuiteConfig
from rayclip.config.loader import validate
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError, nearest
from rayclip.evaluation.layout import open_split, read_class_names, read_templates, split_folder
from rayclip.evaluation.linear_probe import METRICS
from rayclip.inference.prompts import resolve_templates
from rayclip.inference.zero_shot import check_class_names
from rayclip.io.paths import StoragePath, storage_path


@dataclass(frozen=True)
class DataSet:
    """A data set that is there. `class_names` and `templates` are empty where nothing is classified."""

    name: str
    config: DataSetConfig
    folder: StoragePath
    cache: StoragePath
    manifest: Manifest
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        """What people call it."""
        return self.config.title or self.name

    def split(self, name: str) -> Manifest:
        """Another split, as that which a probe is fitted on. Raises UserError for one that is not there."""
        try:
            return open_split(split_folder(self.folder, name), self.cache)
        except UserError as error:
            raise UserError(f"data set '{self.name}': {error}") from None


@dataclass(frozen=True)
class Suite:
    """What is measured; and what is not there, with the reason."""

    datasets: list[DataSet]
    not_there: dict[str, str]


@cache
def entries() -> Mapping[str, Any]:
    """The data sets that are known by name: keys of a DataSetConfig."""
    known: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text())
    return known


def open_suite(config: SuiteConfig) -> Suite:
    """Find every data set. Raises UserError for one that cannot be used, for one that is not there where `require` is
    all, and where none is."""
    found: list[DataSet] = []
    not_there: dict[str, str] = {}
    for name, given in config.datasets.items():
        chosen = resolve(name, given)
        folder = _find(name, chosen, storage_path(config.root))
        if folder is None:
            not_there[name] = _where(name, chosen, config.root)
        else:
            found.append(_open(name, chosen, folder, storage_path(config.cache)))
    if not_there and (config.require == "all" or not found):
        name, where = next(iter(not_there.items()))
        others = f", nor are {len(not_there) - 1} others" if len(not_there) > 1 else ""
        hint = "; require=any goes on without" if found else ""
        raise UserError(f"data set '{name}' is not there{others}: {where}{hint}")
    return Suite(found, not_there)


def resolve(name: str, given: DataSetConfig) -> DataSetConfig:
    """A data set's settings: those given, then its entry's, then defaults."""
    values = {**entries().get(name, {}), **given.model_dump(exclude_unset=True)}
    return validate(DataSetConfig, values, f"data set '{name}'")


def _find(name: str, config: DataSetConfig, root: StoragePath) -> StoragePath | None:
    places = [storage_path(config.path)] if config.path else [root / folder for folder in (name, *config.folders)]
    return next((place for place in places if place.is_dir()), None)


def _where(name: str, config: DataSetConfig, root: str) -> str:
    if config.path:
        return f"no folder '{config.path}'"
    if name not in entries():
        return f"no folder '{root}/{name}', and no entry of that name ({nearest(name, list(entries()))})"
    return f"no folder {' or '.join(f'{root}/{folder}' for folder in (name, *config.folders))}"


def _open(name: str, config: DataSetConfig, folder: StoragePath, cache: StoragePath) -> DataSet:
    """Raises UserError also for a split that a probe lacks, and for a metric that no task gives."""
    dataset = _find_split(name, config, folder, cache)
    if {"linear_probe", "few_shot"} & set(config.tasks):
        for split in filter(None, (config.train_split, config.validation_split)):
            dataset.split(split)
    check_metric(dataset)
    return dataset


def check_metric(dataset: DataSet) -> None:
    """Raise UserError where none of a data set's tasks gives the metric that stands for it."""
    config, metric = dataset.config, dataset.config.main_metric
    probes = [task for task in config.tasks if task in ("linear_probe", "few_shot")]
    if probes and metric not in METRICS:
        raise UserError(
            f"data set '{dataset.name}': metric {metric} is not one of a linear probe: {', '.join(METRICS)}"
        )
    if "corruptions" in config.tasks and config.labels == "multi":
        raise UserError(f"data set '{dataset.name}': task corruptions needs one label a picture")
    given = {metric} if "linear_probe" in probes else set()
    if "zero_shot" in config.tasks:
        single = {"top1", "mean_top1_top5", "mean_per_class"} | (
            {"roc_auc"} if len(dataset.class_names) == 2 else set()
        )
        given |= {"eleven_point_map"} if config.labels == "multi" else single
    if "retrieval" in config.tasks:
        given |= set(RetrievalTask.metrics)
    if metric not in given:
        there = f"they give {', '.join(sorted(given))}" if given else "add zero_shot, linear_probe or retrieval"
        raise UserError(f"data set '{dataset.name}': its tasks give no {metric}: {there}")


def _find_split(name: str, config: DataSetConfig, folder: StoragePath, cache: StoragePath) -> DataSet:
    try:
        split = split_folder(folder, config.split)
        if config.tasks == ("retrieval",):
            return DataSet(name, config, folder, cache, open_split(split, cache), (), (), ())
        names = config.class_names or read_class_names(folder, split)
        check_class_names(names)
        templates = resolve_templates(config.templates or read_templates(folder, split) or config.default_templates)
        manifest = open_split(split, cache)
    except UserError as error:
        raise UserError(f"data set '{name}': {error}") from None
    notes = []
    if config.num_classes is not None and len(names) != config.num_classes:
        notes.append(f"{len(names)} classes, where the paper counts {config.num_classes}")
    return DataSet(name, config, folder, cache, manifest, tuple(names), templates, tuple(notes))
