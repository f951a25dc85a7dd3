"""A linear probe's whole search for its strength, and one fit, beside scikit-learn's LogisticRegression.

Both do the same search, fit anew on training and validation, and are measured on the same test split.

Shapes: N samples, D features, C classes.
"""

import importlib
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmarks.timing import paired_times
from rayclip.config import BenchmarkConfig
from rayclip.evaluation.linear_probe import Split, linear_probe, search_strength
from rayclip.evaluation.logistic import MAX_ITERATIONS, LinearModel, LogisticRegression

_FEATURES, _CLASSES = 512, 100
_ONE_FIT = 1.0


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Ours to a gradient ten times as small as scikit-learn's default, which it runs at; both at most 1,000 steps.

    `search_seconds` is the probe from features to test accuracy, once each. The classes are easy to tell apart, and
    scikit-learn stops after few steps on them.
    `fit_seconds` is one fit from zero, the features' axes included.
    """
    train, validation, test = (_split(config.probe_samples // part, seed) for seed, part in enumerate((1, 4, 4)))
    started = time.perf_counter()
    probe = linear_probe(train, validation, test, _CLASSES)
    searched = time.perf_counter()
    peer_strength, peer_accuracy, peer_model = _peer_probe(train, validation, test)
    peer_searched = time.perf_counter()
    both = train + validation
    fit_s, peer_fit_s, fit_ratio = paired_times(
        lambda: LogisticRegression(train.features_ND, train.targets, _CLASSES).fit(_ONE_FIT),
        lambda: _peer_fit(train, _ONE_FIT),
        config.repeats,
    )
    return {
        "samples": len(train.targets),
        "features": _FEATURES,
        "classes": _CLASSES,
        "search_seconds": round(searched - started, 2),
        "scikit_learn_search_seconds": round(peer_searched - searched, 2),
        "search_time_ratio": round((peer_searched - searched) / (searched - started), 2),
        "strength": probe.search.strength,
        "scikit_learn_strength": peer_strength,
        "test_accuracy": probe.value,
        "scikit_learn_test_accuracy": peer_accuracy,
        "loss": _loss(probe.model, both, probe.search.strength),
        "scikit_learn_loss": _loss(peer_model, both, peer_strength),
        "fit_seconds": round(fit_s, 3),
        "scikit_learn_fit_seconds": round(peer_fit_s, 3),
        "fit_time_ratio": round(fit_ratio, 2),
    }


def _split(num: int, seed: int) -> Split:
    """Classes around centres, their spread falling with the axis as that of features does, on axes turned at random."""
    shared = torch.Generator().manual_seed(0)
    centres_CD = 0.45 * torch.randn(_CLASSES, _FEATURES, generator=shared)
    turned_DD = torch.linalg.qr(torch.randn(_FEATURES, _FEATURES, generator=shared)).Q
    scale_D = torch.arange(1, _FEATURES + 1).pow(-0.5)
    labels_N = torch.arange(num) % _CLASSES
    own = torch.Generator().manual_seed(1 + seed)
    points_ND = (centres_CD[labels_N] + torch.randn(num, _FEATURES, generator=own)) * scale_D
    return Split(10 / scale_D.norm() * points_ND @ turned_DD, labels_N)


def _peer_probe(train: Split, validation: Split, test: Split) -> tuple[float, float, LinearModel]:
    def accuracy(model: Any, split: Split) -> float:
        return float(model.score(split.features_ND.numpy(), split.targets.numpy()))

    search = search_strength(lambda strength: accuracy(_peer_fit(train, strength), validation))
    model = _peer_fit(train + validation, search.strength)
    weight_DC, bias_C = (torch.from_numpy(np.asarray(x, dtype=np.float64)) for x in (model.coef_.T, model.intercept_))
    return search.strength, accuracy(model, test), LinearModel(weight_DC, bias_C)


def _peer_fit(split: Split, strength: float) -> Any:
    peer = importlib.import_module("sklearn.linear_model").LogisticRegression
    return peer(C=1 / strength, max_iter=MAX_ITERATIONS).fit(split.features_ND.numpy(), split.targets.numpy())


def _loss(model: LinearModel, split: Split, strength: float) -> float:
    """The objective that both minimise, a sample, in float64."""
    logits_NC: Tensor = model.scores(split.features_ND.double())
    penalty = strength / 2 * model.weight_DC.square().sum()
    return float(F.cross_entropy(logits_NC, split.targets, reduction="sum") + penalty) / len(split.targets)
