"""A linear probe's whole search for its strength beside scikit-learn's LogisticRegression, which does the same search.

Both fit every strength of the search, fit anew on training and validation, and are measured on the same test split.

Shapes: N samples, D features, C classes.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.config import BenchmarkConfig
from benchmarks.timing import paired_times
from rayclip.evaluation.linear_probe import Split, linear_probe, search_strength, search_with
from rayclip.evaluation.logistic import MAX_ITERATIONS, LinearModel, LogisticRegression

_FEATURES, _CLASSES = 512, 100
_CENTRES = 0.8
_ONE_FIT = 1.0


class _Timed(NamedTuple):
    """What a call gave, and the seconds it took, of the clock and of all processors."""

    result: Any
    wall_s: float
    cpu_s: float


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Both at scikit-learn's own tolerance and at most 1,000 steps; whole searches, once each, one after the other.

    `worst_loss_excess` compares the loss of both at every strength that both tried: the most by which ours is above
    scikit-learn's, as a share of it; below 0 ours is the lower one everywhere. `fit` is one fit from zero.
    """
    train, validation, test = (_split(config.probe_samples // part, seed) for seed, part in enumerate((1, 4, 4)))
    ours = _timed(lambda: linear_probe(train, validation, test, _CLASSES))
    peer = _timed(lambda: _peer_probe(train, validation, test))
    probe, (peer_search, peer_accuracy, peer_models) = ours.result, peer.result
    fit_s, peer_fit_s, fit_ratio = paired_times(
        lambda: LogisticRegression(train.features_ND, train.targets, _CLASSES).fit(_ONE_FIT),
        lambda: _peer_fit(train, _ONE_FIT),
        config.repeats,
    )
    return {
        "samples": len(train.targets),
        "features": _FEATURES,
        "classes": _CLASSES,
        "threads": torch.get_num_threads(),
        "search_cpu_seconds": round(ours.cpu_s, 2),
        "scikit_learn_search_cpu_seconds": round(peer.cpu_s, 2),
        "ratio_vs_sklearn": round(peer.cpu_s / ours.cpu_s, 2),
        "search_seconds": round(ours.wall_s, 2),
        "scikit_learn_search_seconds": round(peer.wall_s, 2),
        "time_ratio_vs_sklearn": round(peer.wall_s / ours.wall_s, 2),
        "strength": probe.search.strength,
        "scikit_learn_strength": peer_search.strength,
        "validation_accuracy": max(probe.search.tried.values()),
        "scikit_learn_validation_accuracy": max(peer_search.tried.values()),
        "test_accuracy": probe.value,
        "scikit_learn_test_accuracy": peer_accuracy,
        **_agreement(train, validation, peer_models),
        "fit_seconds": round(fit_s, 3),
        "scikit_learn_fit_seconds": round(peer_fit_s, 3),
        "fit_time_ratio": round(fit_ratio, 2),
    }


def _timed(function: Callable[[], Any]) -> _Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return _Timed(result, time.perf_counter() - wall, time.process_time() - cpu)


def _agreement(train: Split, validation: Split, peer_models: dict[float, LinearModel]) -> dict[str, float]:
    """Of our solutions, in the same search, with scikit-learn's at the same strengths; not timed."""
    _, fits = search_with(train, validation, _CLASSES)
    both = [(fit.model, peer_models[strength], strength) for strength, fit in fits.items() if strength in peer_models]
    excess = [_loss(ours, train, strength) / _loss(peer, train, strength) - 1 for ours, peer, strength in both]
    same = [_answers(ours, validation) == _answers(peer, validation) for ours, peer, _ in both]
    return {
        "strengths_in_common": len(both),
        "worst_loss_excess": max(excess),
        "median_loss_excess": float(np.median(excess)),
        "same_answers": float(torch.stack(same).double().mean()),
    }


def _answers(model: LinearModel, split: Split) -> Tensor:
    return model.scores(split.features_ND).argmax(dim=1)


def _split(num: int, seed: int) -> Split:
    """Overlapping classes off zero, on axes turned at random. The spread falls with the axis as that of features does,
    and what tells classes apart falls faster: it lies in the leading axes."""
    shared = torch.Generator().manual_seed(0)
    axis_D = torch.arange(1, _FEATURES + 1)
    centres_CD = _CENTRES * torch.randn(_CLASSES, _FEATURES, generator=shared) * axis_D.pow(-0.3)
    turned_DD = torch.linalg.qr(torch.randn(_FEATURES, _FEATURES, generator=shared)).Q
    mean_D = torch.randn(_FEATURES, generator=shared)
    labels_N = torch.arange(num) % _CLASSES
    own = torch.Generator().manual_seed(1 + seed)
    scale_D = axis_D.pow(-0.5)
    points_ND = (centres_CD[labels_N] + torch.randn(num, _FEATURES, generator=own)) * scale_D
    return Split(10 / scale_D.norm() * points_ND @ turned_DD + 5 / mean_D.norm() * mean_D, labels_N)


def _peer_probe(train: Split, validation: Split, test: Split) -> tuple[Any, float, dict[float, LinearModel]]:
    """The search, its test accuracy, and what was fitted on training, by strength."""
    models: dict[float, Any] = {}

    def score(strength: float) -> float:
        models[strength] = _peer_fit(train, strength)
        return _peer_accuracy(models[strength], validation)

    search = search_strength(score)
    accuracy = _peer_accuracy(_peer_fit(train + validation, search.strength), test)
    return search, accuracy, {strength: _linear(model) for strength, model in models.items()}


def _peer_accuracy(model: Any, split: Split) -> float:
    return float(model.score(split.features_ND.numpy(), split.targets.numpy()))


def _linear(model: Any) -> LinearModel:
    return LinearModel(*(torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (model.coef_.T, model.intercept_)))


def _peer_fit(split: Split, strength: float) -> Any:
    peer = importlib.import_module("sklearn.linear_model").LogisticRegression
    # Its BLAS has threads of its own, of which torch knows nothing: it gets as many as ours.
    with importlib.import_module("threadpoolctl").threadpool_limits(torch.get_num_threads()):
        return peer(C=1 / strength, max_iter=MAX_ITERATIONS).fit(split.features_ND.numpy(), split.targets.numpy())


def _loss(model: LinearModel, split: Split, strength: float) -> float:
    """The objective that both minimise, a sample, in float64."""
    logits_NC: Tensor = model.scores(split.features_ND.double())
    penalty = strength / 2 * model.weight_DC.square().sum()
    return float(F.cross_entropy(logits_NC, split.targets, reduction="sum") + penalty) / len(split.targets)
