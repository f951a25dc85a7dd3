"""The metrics against scikit-learn, SciPy and formulas written out, with equal scores among them."""

import numpy as np
import pytest
import torch

from rayclip.errors import UserError
from rayclip.evaluation import metrics

NUM, CLASSES = 300, 7


@pytest.fixture(scope="module")
def data():
    """Scores on a grid of 20 values, so many are equal; labels of every class; bool targets."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 20, (NUM, CLASSES), generator=generator) / 20
    labels = torch.arange(NUM) % CLASSES
    return scores, labels, torch.rand(NUM, CLASSES, generator=generator) < 0.2 + 0.3 * scores


def test_single_label_metrics_equal_scikit_learn(data):
    sklearn = pytest.importorskip("sklearn.metrics")
    _, labels, _ = data
    scores = torch.randn(NUM, CLASSES, generator=torch.Generator().manual_seed(1))  # sklearn orders ties otherwise
    for k in (1, 5):
        expected = sklearn.top_k_accuracy_score(labels, scores, k=k, labels=range(CLASSES))
        assert metrics.accuracy(scores, labels, k) == pytest.approx(expected, abs=1e-12)
    expected = sklearn.balanced_accuracy_score(labels[:-3], scores[:-3].argmax(1))
    assert metrics.mean_per_class(scores[:-3], labels[:-3]) == pytest.approx(expected, abs=1e-12)
    both = (metrics.accuracy(scores, labels, 1) + metrics.accuracy(scores, labels, 5)) / 2
    assert metrics.mean_of_top1_and_top5(scores, labels) == both


def test_curves_equal_scikit_learn(data):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, _, targets = data
    expected = sklearn.average_precision_score(targets, scores, average="macro")
    assert metrics.multi_label_map(scores, targets) == pytest.approx(expected, abs=1e-12)
    for column in range(CLASSES):
        expected = sklearn.roc_auc_score(targets[:, column], scores[:, column])
        assert metrics.roc_auc(scores[:, column], targets[:, column]) == pytest.approx(expected, abs=1e-12)


def test_eleven_points_equal_the_definition(data):
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, _, targets = data
    values = []
    for column in range(CLASSES):
        # The curve's last point, precision 1 at recall 0, is scikit-learn's own and stands for no threshold.
        precision, recall, _ = sklearn.precision_recall_curve(targets[:, column], scores[:, column])
        precision, recall = precision[:-1], recall[:-1]
        values.append(np.mean([precision[recall >= tenth / 10 - 1e-9].max() for tenth in range(11)]))
    assert metrics.eleven_point_map(scores, targets) == pytest.approx(np.mean(values), abs=1e-12)


def test_eleven_points_by_hand():
    # In order of score: right, wrong, right. Recall to 0.5 at precision 1 (6 points), then 2/3 (5 points).
    scores, targets = torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[True], [False], [True]])
    assert metrics.eleven_point_map(scores, targets) == pytest.approx((6 + 5 * 2 / 3) / 11)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (3, 10), (633, 1000), (1, 1)])
def test_interval_equals_scipy(correct, total):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(correct, total).proportion_ci(method="wilson")
    assert metrics.wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_order_of_samples_changes_nothing(data):
    scores, labels, targets = data
    order = torch.randperm(NUM, generator=torch.Generator().manual_seed(3))
    for metric, truth in (
        (metrics.multi_label_map, targets),
        (metrics.eleven_point_map, targets),
        (metrics.mean_per_class, labels),
    ):
        assert metric(scores, truth) == pytest.approx(metric(scores[order], truth[order]), abs=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.accuracy(torch.zeros(2, 3), torch.tensor([0, 3])), "label 3 of picture 1 is out of range"),
        (lambda: metrics.accuracy(torch.zeros(2, 3), torch.tensor([0])), "2 rows of scores with 1 labels"),
        (lambda: metrics.accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)), "the split is empty"),
        (lambda: metrics.accuracy(torch.full((1, 3), torch.nan), torch.tensor([0])), "not finite"),
        (lambda: metrics.mean_per_class(torch.zeros(2, 3), torch.tensor([0, 2])), "class 1 of 3 has no pictures"),
        (lambda: metrics.multi_label_map(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.bool)), "class 0 of 1"),
        (lambda: metrics.roc_auc(torch.zeros(2), torch.ones(2, dtype=torch.bool)), "2 positives and 0 negatives"),
        (lambda: metrics.wilson_interval(2, 1), "got 2 of 1"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_a_share_lies_within_its_interval_also_at_the_ends():
    for num_samples in range(1, 400):
        assert metrics.wilson_interval(0, num_samples)[0] == 0
        assert metrics.wilson_interval(num_samples, num_samples)[1] == 1
