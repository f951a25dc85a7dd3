"""What is measured on a data set of a suite, each task from its features alone.

Shapes: N pictures, M captions, C classes, T templates, P prompts, E embedding, W width before the projection.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rayclip.config import SuiteConfig
from rayclip.errors import UserError
from rayclip.evaluation import scoring
from rayclip.evaluation.calibration import (
    calibration_error,
    confusions,
    reliability,
    write_confusions,
    write_reliability,
)
from rayclip.evaluation.corruptions import STRENGTHS
from rayclip.evaluation.features import FeatureFolder
from rayclip.evaluation.linear_probe import METRICS, Metric, Split, few_shot, linear_probe
from rayclip.evaluation.plots import write_corruptions
from rayclip.evaluation.reports import ANSWERS, RANKS
from rayclip.evaluation.retrieval import retrieval_ranks
from rayclip.evaluation.robustness import mean_corruption_error
from rayclip.evaluation.suite import DataSet, check_metric
from rayclip.inference.zero_shot import class_prompts, mean_of_prompts
from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath

Result = dict[str, Any]

_VALIDATION_ONE_IN = 5


class Measured(NamedTuple):
    """What a task is given: features by what they are of (pictures, prompts, train), and a folder to write into."""

    dataset: DataSet
    config: SuiteConfig
    logit_scale: float
    features: Mapping[str, FeatureFolder]
    folder: StoragePath


def measure(measured: Measured) -> Result:
    """All tasks of a data set, and the figure that stands for it. Plain values. Raises UserError."""
    dataset = measured.dataset
    check_metric(dataset)
    result: Result = {
        "title": dataset.title,
        "metric": dataset.config.main_metric,
        "num_samples": dataset.manifest.total_samples,
        "num_classes": len(dataset.class_names),
        "source": dataset.manifest.folder,
        "source_digest": dataset.manifest.digest,
        "notes": list(dataset.notes),
    }
    try:
        result |= {task: TASKS[task](measured) for task in dataset.config.tasks}
    except UserError as error:
        raise UserError(f"data set '{dataset.name}': {error}") from None
    name = dataset.config.main_metric
    score = next(result[task]["figures"][name] for task in dataset.config.tasks if name in result[task]["figures"])
    return {**result, "score": score}


def _zero_shot(measured: Measured) -> Result:
    dataset = measured.dataset
    num_classes = len(dataset.class_names)
    prompts_PE = measured.features["prompts"].texts()
    _, rows_TC = class_prompts(dataset.class_names, dataset.templates)
    images = measured.features["pictures"].images()
    if dataset.config.labels == "multi":
        scores = scoring.score(images, mean_of_prompts(prompts_PE, rows_TC))
        return {"templates": list(dataset.templates), "figures": _plain(scoring.multi_label_figures(scores))}
    answers = scoring.answer(images, prompts_PE, rows_TC, measured.logit_scale, keep_scores=num_classes == 2)
    if not dataset.config.allow_empty_classes:
        scoring.check_classes(answers, dataset.class_names)
    _write_answers(measured.folder / ANSWERS, answers)
    return {
        "templates": scoring.template_report(answers, dataset.templates),
        "figures": _plain(scoring.figures(answers, num_classes)),
        "chance_top1": 1 / num_classes,
        **_calibration(measured, answers),
    }


def _calibration(measured: Measured, answers: scoring.Answers) -> Result:
    """How far confidence may be believed, and what is taken for what; both as pictures in the folder too."""
    names = measured.dataset.class_names
    bins = reliability(answers.confidence_N, answers.correct)
    found = confusions(answers.label_N, answers.answer_N, len(names))
    write_reliability(measured.folder / "calibration.png", bins)
    if found:
        write_confusions(measured.folder / "confusions.png", found, names)
    pairs = [{"label": names[c.label], "answer": names[c.answer], "count": c.count, "share": c.share} for c in found]
    return {"calibration_error": calibration_error(bins), "confusions": pairs}


def _retrieval(measured: Measured) -> Result:
    ids, *columns = zip(*measured.features["pictures"].captioned(), strict=True)
    images_NE, texts_ME, counts_N, text_ids_M = map(torch.cat, columns)
    image_of_text_M = torch.arange(len(images_NE)).repeat_interleave(counts_N)
    rank_N, rank_M = retrieval_ranks(images_NE, texts_ME, image_of_text_M, text_ids_M)
    _write_ranks(measured.folder / RANKS, [id for of_part in ids for id in of_part], counts_N, rank_N, rank_M)
    ranks = {"image_to_text": rank_N, "text_to_image": rank_M}
    shares = {f"{way}.recall_at_{k}": scoring.share(rank < k) for way, rank in ranks.items() for k in (1, 5, 10)}
    return {"num_images": len(rank_N), "num_texts": len(rank_M), "figures": _plain(shares)}


def _linear_probe(measured: Measured) -> Result:
    train, validation, test = _splits(measured)
    metric = measured.dataset.config.main_metric
    probe = linear_probe(train, validation, test, len(measured.dataset.class_names), _metric_of(measured))
    count = round(probe.value * len(test.targets))
    figure = scoring.share_of(count, len(test.targets)) if metric == "top1" else scoring.Figure(probe.value)
    return {
        "strength": probe.search.strength,
        "iterations": probe.fit.iterations,
        "num_train": len(train.targets) + len(validation.targets),
        "figures": _plain({metric: figure}),
    }


def _few_shot(measured: Measured) -> Result:
    config, dataset = measured.config, measured.dataset
    metric = _metric_of(measured)
    found = few_shot(*_splits(measured), len(dataset.class_names), config.shots, config.seeds, metric)
    return {
        "seeds": config.seeds,
        "figures": _plain({f"shots_{few.shots}": scoring.Figure(few.mean, few.low, few.high) for few in found}),
    }


def corrupted(name: str, strength: int) -> str:
    """What features of pictures made worse are called."""
    return f"{name} {strength}"


def _corruptions(measured: Measured) -> Result:
    """Zero-shot of pictures made worse; a mean's interval takes all versions of a picture as one draw."""
    dataset = measured.dataset
    _, rows_TC = class_prompts(dataset.class_names, dataset.templates)
    classes_CE = mean_of_prompts(measured.features["prompts"].texts(), rows_TC)

    def right(features: str) -> Tensor:
        return scoring.right_answers(measured.features[features].images(), classes_CE)

    clean, names = scoring.share(right("pictures")), tuple(map(str, dataset.config.corruptions))
    right_by_name = {name: torch.stack([right(corrupted(name, s)) for s in STRENGTHS]).double() for name in names}
    by_strength = {
        name: [scoring.share(right_N)._asdict() for right_N in right_SN] for name, right_SN in right_by_name.items()
    }
    write_corruptions(measured.folder / "corruptions.png", clean.value, by_strength)
    figures = {name: scoring.mean_difference(right_SN.mean(dim=0)) for name, right_SN in right_by_name.items()}
    all_N = torch.stack([right_SN.mean(dim=0) for right_SN in right_by_name.values()]).mean(dim=0)
    figures = {"without": clean, "mean_of_corrupted": scoring.mean_difference(all_N), **figures}
    errors = {name: (1 - right_SN.mean(dim=1)).tolist() for name, right_SN in right_by_name.items()}
    return {
        "by_strength": by_strength,
        "mean_corruption_error": mean_corruption_error(errors),
        "figures": _plain(figures),
    }


def _metric_of(measured: Measured) -> Metric:
    return METRICS[measured.dataset.config.main_metric]


def _splits(measured: Measured) -> tuple[Split, Split, Split]:
    """Features before the projection, of training, validation and test."""
    train, test = (_split(measured, name) for name in ("train", "pictures"))
    if "validation" in measured.features:
        return train, _split(measured, "validation"), test
    order_N = torch.randperm(len(train.targets), generator=torch.Generator().manual_seed(0))
    held = len(order_N) // _VALIDATION_ONE_IN
    return train[order_N[held:]], train[order_N[:held]], test


def _split(measured: Measured, name: str) -> Split:
    multi, num_classes = measured.dataset.config.labels == "multi", len(measured.dataset.class_names)
    parts = [
        (part.features_NE, part.targets(num_classes) if multi else part.labels)
        for part in measured.features[name].images(pooled=True)
    ]
    return Split(*(torch.cat(column) for column in zip(*parts, strict=True)))


TASKS: dict[str, Callable[[Measured], Result]] = {
    "zero_shot": _zero_shot,
    "retrieval": _retrieval,
    "linear_probe": _linear_probe,
    "few_shot": _few_shot,
    "corruptions": _corruptions,
}
"""Tasks by name; each gives `figures`, by name, and what else there is to tell."""


def _plain(figures: Mapping[str, scoring.Figure]) -> dict[str, dict[str, float | None]]:
    return {name: figure._asdict() for name, figure in figures.items()}


def _write_answers(path: StoragePath, answers: scoring.Answers) -> None:
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


def _write_ranks(path: StoragePath, ids: list[str], counts_N: Tensor, rank_N: Tensor, rank_M: Tensor) -> None:
    """Write what two models are compared by, query by query: a row an image, and one a caption with its image's id."""
    of_text = torch.arange(len(ids)).repeat_interleave(counts_N).tolist()
    table = pa.table(
        {
            "way": ["image_to_text"] * len(ids) + ["text_to_image"] * len(of_text),
            "id": [*ids, *(ids[image] for image in of_text)],
            "rank": torch.cat([rank_N, rank_M]).numpy().astype("int32"),
        }
    )
    with whole_file(path) as target:
        pq.write_table(table, target, compression="zstd")
