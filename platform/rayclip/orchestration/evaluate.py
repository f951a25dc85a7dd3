"""Measuring a model with a suite: features of all its data sets by the whole cluster, then task by task from them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from rayclip.config import SuiteConfig
from rayclip.errors import UserError
from rayclip.evaluation import scoring
from rayclip.evaluation.features import FeatureFolder
from rayclip.evaluation.page import write_report
from rayclip.evaluation.plots import write_bars
from rayclip.evaluation.reports import ANSWERS, SUMMARY, Report, compare
from rayclip.evaluation.retrieval import recall_at_k
from rayclip.evaluation.suite import DataSet, open_suite
from rayclip.files import whole_file, write_json
from rayclip.inference.zero_shot import class_prompts, mean_of_prompts
from rayclip.orchestration.embed import Model, open_model
from rayclip.orchestration.features import Extraction, extract, pictures_of, prompts_of
from rayclip.tracking.experiment import log_result

_MAIN_FIGURE = {"accuracy": "top1", "image_recall_at_1": "text_to_image.recall_at_1"}
"""The figure that a data set's metric names, where it is called otherwise."""

Result = dict[str, Any]


def evaluate(config: SuiteConfig) -> Result:
    """Measure the model on all data sets of the suite, and write the report. Returns its summary. Raises UserError."""
    suite = open_suite(config)
    model = open_model(config.model, config.tracking_uri)
    output = output_folder(config, model)
    wanted = {dataset.name: _extractions(dataset, model, config) for dataset in suite.datasets}
    extraction = extract([e for of_one in wanted.values() for e in of_one.values()], config.cluster)
    results = {}
    for dataset in suite.datasets:
        features = {name: extraction.features for name, extraction in wanted[dataset.name].items()}
        results[dataset.name] = _measure(dataset, model, features, output / dataset.name)
    summary = {
        "suite": config.name,
        "model": config.model,
        "model_name": model.source.name,
        "model_version": model.source.version,
        "weights_sha256": model.weights_sha256,
        "datasets": results,
        "not_there": suite.not_there,
        "extraction": extraction,
        "output": str(output),
    }
    write_json(output / SUMMARY, summary)
    bars, page = output / "scores.png", output / "report.html"
    write_bars(bars, compare([Report(output, summary)]))
    write_report(page, summary, bars, {name: sorted((output / name).glob("*.png")) for name in results})
    _log(config, summary, page)
    return summary


def _log(config: SuiteConfig, summary: Result, page: Path) -> None:
    if config.experiment is None:
        return
    metrics = {
        f"{config.name}/{name}/{task}/{figure}": value["value"]
        for name, result in summary["datasets"].items()
        for task in _TASKS
        if task in result
        for figure, value in result[task]["figures"].items()
    }
    settings = {**config.model_dump(mode="json"), "model_version": summary["model_version"]}
    name = f"{config.name} {summary['model_version']}"
    log_result(config.tracking_uri, config.experiment, "evaluation", name, settings, metrics, [page])


def output_folder(config: SuiteConfig, model: Model) -> Path:
    """Where the report goes: each version of a model has one of its own."""
    version = re.sub(r"[^A-Za-z0-9._@-]+", "-", model.source.version)
    return Path(config.output or Path("runs/evaluations") / config.name / version).absolute()


def _extractions(dataset: DataSet, model: Model, config: SuiteConfig) -> dict[str, Extraction]:
    """What features the data set's tasks need."""
    needed = {"pictures": pictures_of(dataset, model, config)}
    if dataset.class_names:
        prompts, _ = class_prompts(dataset.class_names, dataset.templates)
        needed["prompts"] = prompts_of(prompts, model, config)
    return needed


def _measure(dataset: DataSet, model: Model, features: dict[str, FeatureFolder], folder: Path) -> Result:
    result: Result = {
        "title": dataset.title,
        "metric": dataset.config.metric,
        "num_samples": dataset.manifest.total_samples,
        "num_classes": len(dataset.class_names),
        "source": dataset.manifest.folder,
        "source_digest": dataset.manifest.digest,
        "notes": list(dataset.notes),
    }
    try:
        for task in dataset.config.tasks:
            result[task] = _TASKS[task](dataset, model, features, folder)
    except UserError as error:
        raise UserError(f"data set '{dataset.name}': {error}") from None
    name = _MAIN_FIGURE.get(dataset.config.metric, dataset.config.metric)
    found = [result[task]["figures"][name] for task in dataset.config.tasks if name in result[task]["figures"]]
    if not found:
        raise UserError(f"data set '{dataset.name}': its tasks give no {dataset.config.metric}: set metric, or labels")
    result["score"] = found[0]
    write_json(folder / SUMMARY, result)
    return result


def _zero_shot(dataset: DataSet, model: Model, features: dict[str, FeatureFolder], folder: Path) -> Result:
    prompts_PE = features["prompts"].texts()
    _, rows_TC = class_prompts(dataset.class_names, dataset.templates)
    pictures = features["pictures"].pictures()
    if dataset.config.labels == "multi":
        scores = scoring.score(pictures, mean_of_prompts(prompts_PE, rows_TC))
        return {"templates": list(dataset.templates), "figures": _plain(scoring.multi_label_figures(scores))}
    two_classes = len(dataset.class_names) == 2
    answers = scoring.answer(pictures, prompts_PE, rows_TC, model.logit_scale, keep_scores=two_classes)
    if not dataset.config.allow_empty_classes:
        scoring.check_classes(answers, dataset.class_names)
    _write_answers(folder / ANSWERS, answers)
    return {
        "templates": scoring.template_report(answers, dataset.templates),
        "figures": _plain(scoring.figures(answers, len(dataset.class_names))),
        "chance_top1": 1 / len(dataset.class_names),
    }


def _retrieval(dataset: DataSet, model: Model, features: dict[str, FeatureFolder], folder: Path) -> Result:
    images, texts, counts = (torch.cat(column) for column in zip(*features["pictures"].captioned(), strict=True))
    image_of_text_M = torch.arange(len(images)).repeat_interleave(counts)
    recall = recall_at_k(images, texts, image_of_text_M)
    sizes = {name: int(recall.pop(name)) for name in ("num_images", "num_texts")}
    shares = {}
    for name, value in recall.items():
        total = sizes["num_images" if name.startswith("image") else "num_texts"]
        count = round(value * total)
        shares[name] = scoring.share(torch.arange(total) < count)
    return {**sizes, "figures": _plain(shares)}


_TASKS: dict[str, Callable[[DataSet, Model, dict[str, FeatureFolder], Path], Result]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
}


def _plain(figures: dict[str, scoring.Figure]) -> dict[str, dict[str, float | None]]:
    return {name: figure._asdict() for name, figure in figures.items()}


def _write_answers(path: Path, answers: scoring.Answers) -> None:
    """What two models are compared by, picture by picture."""
    columns = {"label": answers.label_N, "answer": answers.answer_N, "rank": answers.rank_N}
    table = pa.table(
        {
            "id": answers.ids,
            **{name: column.numpy().astype("int32") for name, column in columns.items()},
            "confidence": answers.confidence_N.numpy(),
        }
    )
    with whole_file(path) as target:
        pq.write_table(table, target, compression="zstd")
