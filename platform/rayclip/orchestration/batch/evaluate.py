"""Measuring a model with a suite: features of all its data sets by the whole cluster, then task by task from them."""

import json
import re
from itertools import product
from typing import Any

from rayclip.config import SuiteConfig
from rayclip.config.fields import describe_replaced
from rayclip.evaluation.corruptions import STRENGTHS
from rayclip.evaluation.page import write_report
from rayclip.evaluation.plots import write_bars
from rayclip.evaluation.reports import SUMMARY, EvaluationReport, compare
from rayclip.evaluation.shift import has_accuracy, read_baselines, shift_report
from rayclip.evaluation.suite import DataSet, Suite, open_suite
from rayclip.evaluation.suite_tasks import TASKS, Measured, corrupted, measure
from rayclip.inference.zero_shot import class_prompts
from rayclip.io.files import write_json
from rayclip.io.lease import hold
from rayclip.io.paths import StoragePath, matching, storage_path
from rayclip.orchestration.batch.embed import EmbeddingModel, open_model
from rayclip.orchestration.batch.features import Extraction, extract, images_of, prompts_of
from rayclip.orchestration.cluster.progress import note
from rayclip.tracking.experiment import log_result

_SAME_REPORT = {"cluster", "experiment", "tracking_uri", "cache", "batch_size", "part_samples", "output"}
"""Settings that change nothing of what is measured."""


def evaluate(config: SuiteConfig) -> dict[str, Any]:
    """Measure the model on all data sets of the suite, and write the report. Returns its summary. Raises UserError."""
    suite, baselines = open_suite(config), read_baselines(config.baselines)
    model = open_model(config.model, config.tracking_uri)
    output = output_folder(config, model.source.version)
    with hold(output, f"the report '{output}'", say=note):
        settings = {"settings": config.model_dump(mode="json", exclude=_SAME_REPORT)}
        _say_replaced(output, settings | {"weights_sha256": model.weights_sha256})
        return _evaluate(config, suite, baselines, model, output, settings)


def _say_replaced(output: StoragePath, now: dict[str, Any]) -> None:
    """Say where a report lies in the folder that is of something else."""
    try:
        before = json.loads((output / SUMMARY).read_text())
    except (OSError, ValueError):
        return
    replaced = describe_replaced(before, now)
    if before.get("weights_sha256") != now["weights_sha256"]:
        replaced = "it was of other weights of the same name"
    if replaced:
        note(f"the report in '{output}' is replaced: {replaced}")


def _evaluate(
    config: SuiteConfig,
    suite: Suite,
    baselines: dict[str, dict[str, float]],
    model: EmbeddingModel,
    output: StoragePath,
    settings: dict[str, Any],
) -> dict[str, Any]:
    wanted = {dataset.name: _extractions(dataset, model, config) for dataset in suite.datasets}
    # Data sets of the same classes and templates have the same prompts.
    distinct = {needed.job.output.path: needed for of_one in wanted.values() for needed in of_one.values()}
    extracted = extract(list(distinct.values()), config.cluster)
    results = {}
    for dataset in suite.datasets:
        features = {name: needed.features for name, needed in wanted[dataset.name].items()}
        folder = output / dataset.name
        results[dataset.name] = measure(Measured(dataset, config, model.logit_scale, features, folder))
    for dataset in suite.datasets:
        folder, of = output / dataset.name, dataset.config.shift_of
        if of is not None and has_accuracy(results, of) and has_accuracy(results, dataset.name):
            image = folder / "effective_robustness.png"
            found = shift_report(dataset.name, of, results, model.source.version, baselines, image)
            results[dataset.name]["shift"] = found
        write_json(folder / SUMMARY, results[dataset.name])
    summary = {
        "suite": config.name,
        "model": config.model,
        "model_name": model.source.name,
        "model_version": model.source.version,
        "weights_sha256": model.weights_sha256,
        "datasets": results,
        "not_there": suite.not_there,
        "extraction": extracted,
        "output": str(output),
        **settings,
    }
    write_json(output / SUMMARY, summary)
    bars, page = output / "scores.png", output / "report.html"
    write_bars(bars, compare([EvaluationReport(output, summary)]))
    write_report(page, summary, bars, {name: matching(output / name, "*.png") for name in results})
    _log(config, summary, page)
    return summary


def output_folder(config: SuiteConfig, version: str) -> StoragePath:
    """Where the report goes: each version of a model has one of its own."""
    name = re.sub(r"[^A-Za-z0-9._@-]+", "-", version)
    return storage_path(config.output or f"runs/evaluations/{config.name}/{name}")


def _extractions(dataset: DataSet, model: EmbeddingModel, config: SuiteConfig) -> dict[str, Extraction]:
    """What features the data set's tasks need."""
    needed = {"pictures": images_of(dataset, model, config)}
    if dataset.class_names:
        prompts, _ = class_prompts(dataset.class_names, dataset.templates)
        needed["prompts"] = prompts_of(prompts, model, config)
    if "corruptions" in dataset.config.tasks:
        for worse in product(dataset.config.corruptions, STRENGTHS):
            needed[corrupted(*worse)] = images_of(dataset, model, config, corruption=worse)
    if {"linear_probe", "few_shot"} & set(dataset.config.tasks):
        needed["train"] = images_of(dataset, model, config, dataset.config.train_split)
        if dataset.config.validation_split is not None:
            needed["validation"] = images_of(dataset, model, config, dataset.config.validation_split)
    return needed


def _log(config: SuiteConfig, summary: dict[str, Any], page: StoragePath) -> None:
    if config.experiment is None:
        return
    metrics = {
        f"{config.name}/{name}/{task}/{figure}": value["value"]
        for name, result in summary["datasets"].items()
        for task in TASKS
        if task in result
        for figure, value in result[task]["figures"].items()
    }
    settings = {**config.model_dump(mode="json"), "model_version": summary["model_version"]}
    name = f"{config.name} {summary['model_version']}"
    log_result(config.tracking_uri, config.experiment, "evaluation", name, settings, metrics, [page])
