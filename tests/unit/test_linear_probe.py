"""Linear probes against scikit-learn on the same search, and the search against all 97 strengths."""

import math

import pytest
import torch

from rayclip.errors import UserError
from rayclip.evaluation import metrics
from rayclip.evaluation.linear_probe import Split, draw_shots, few_shot, linear_probe, search_strength
from rayclip.evaluation.logistic import LogisticRegression

DIM = 20


def split(num, seed, classes, spread=1.0):
    """Float64 features around a centre a class, off zero and on unequal axes."""
    centres = torch.randn(classes, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(num, DIM, generator=torch.Generator().manual_seed(1 + seed), dtype=torch.float64)
    labels = torch.arange(num) % classes
    return Split((centres[labels] + 2 * spread * noise) * torch.linspace(0.2, 3, DIM) + 5, labels)


def peer_fit(data, strength, tolerance=1e-9):
    sklearn = pytest.importorskip("sklearn.linear_model")
    peer = sklearn.LogisticRegression(C=1 / strength, tol=tolerance, max_iter=20_000)
    return peer.fit(data.features_ND.numpy(), data.targets.numpy())


@pytest.mark.parametrize("strength", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize(("classes", "num"), [(5, 150), (2, 150), (7, 14)])
def test_a_fit_is_scikit_learns(classes, num, strength):
    data = split(num, 0, classes)
    peer = peer_fit(data, strength)
    model = LogisticRegression(data.features_ND, data.targets, classes).fit(strength, tolerance=1e-10).model
    weight, bias = torch.tensor(peer.coef_.T), torch.tensor(peer.intercept_)
    ours, our_bias = model.weight_DC, model.bias_C
    if classes == 2:  # one sigmoid there
        ours, our_bias = ours[:, 1:] - ours[:, :1], our_bias[1:] - our_bias[:1]
    # scikit-learn stops where its loss no longer changes: its gradient is then 600 times ours and more.
    assert (ours - weight).abs().max() <= 5e-4 * weight.abs().max()
    assert (our_bias - bias).abs().max() <= 5e-4 * max(1, bias.abs().max())


def test_a_start_changes_the_way_and_not_the_answer():
    data = split(400, 0, 5)
    regression = LogisticRegression(data.features_ND, data.targets, 5)
    cold = regression.fit(1.0, tolerance=1e-10)
    warm = regression.fit(1.0, regression.fit(3.0).model, tolerance=1e-10)
    assert torch.allclose(warm.model.weight_DC, cold.model.weight_DC, atol=1e-6)
    assert warm.loss == pytest.approx(cold.loss, rel=1e-12)
    assert regression.fit(1.0, cold.model, tolerance=1e-9).iterations == 0


def test_the_gradient_vanishes_at_the_answer():
    data = split(300, 0, 5)
    model = LogisticRegression(data.features_ND, data.targets, 5).fit(0.3, tolerance=1e-9).model
    weight, bias = model.weight_DC.clone().requires_grad_(), model.bias_C.clone().requires_grad_()
    logits = data.features_ND @ weight + bias
    loss = torch.nn.functional.cross_entropy(logits, data.targets, reduction="sum") + 0.15 * weight.square().sum()
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-4


def test_several_labels_are_a_sigmoid_each():
    data = split(300, 0, 3)
    targets = torch.stack([data.targets == 0, data.features_ND[:, 3] > 5, data.targets != 2], dim=1)
    model = LogisticRegression(data.features_ND, targets, 3).fit(2.0, tolerance=1e-10).model
    for column in range(3):
        peer = peer_fit(Split(data.features_ND, targets[:, column]), 2.0)
        expected = torch.tensor(peer.decision_function(data.features_ND.numpy()))
        assert torch.allclose(model.scores(data.features_ND)[:, column], expected, atol=1e-3)


def test_float32_features_give_the_same_within_their_precision():
    data = split(400, 0, 5)
    exact = LogisticRegression(data.features_ND, data.targets, 5).fit(1.0, tolerance=1e-9).model
    rough = LogisticRegression(data.features_ND.float(), data.targets, 5).fit(1.0, tolerance=1e-9).model
    assert torch.allclose(exact.weight_DC, rough.weight_DC, atol=1e-4)


def test_a_probe_chooses_and_answers_as_scikit_learn_on_the_same_search():
    train, validation, test = split(150, 0, 3, 1.5), split(150, 1, 3, 1.5), split(300, 2, 3, 1.5)
    probe = linear_probe(train, validation, test, 3, tolerance=1e-8)
    search = search_strength(
        lambda strength: peer_fit(train, strength, 1e-7).score(validation.features_ND.numpy(), validation.targets)
    )
    assert probe.search.strength == search.strength
    assert probe.search.tried == pytest.approx(search.tried, abs=1e-6)
    peer = peer_fit(train + validation, search.strength, 1e-7)
    assert probe.value == pytest.approx(peer.score(test.features_ND.numpy(), test.targets), abs=1 / 300)


@pytest.mark.parametrize("peak", [-6, -3.3, 0.125, 1.9, 6])
def test_the_search_finds_a_single_peak_among_97_strengths_in_15(peak):
    found = search_strength(lambda strength: -abs(math.log10(strength) - peak))
    assert abs(math.log10(found.strength) - peak) <= 1 / 16 + 1e-9
    assert len(found.tried) <= 15
    assert list(found.tried)[:7] == pytest.approx([1e6, 1e4, 1e2, 1, 1e-2, 1e-4, 1e-6])


def test_of_equal_scores_the_stronger_penalty_is_chosen():
    assert search_strength(lambda strength: 0.5).strength == 1e6


def test_a_metric_of_the_data_set_is_what_is_searched_for():
    train, validation, test = split(60, 0, 3), split(60, 1, 3), split(60, 2, 3)
    probe = linear_probe(train, validation, test, 3, metrics.mean_per_class)
    assert probe.value == metrics.mean_per_class(probe.model.scores(test.features_ND), test.targets)


def test_few_shot_draws_by_class_and_seed_and_gives_an_interval():
    stats = pytest.importorskip("scipy.stats")
    train, validation, test = split(90, 0, 3), split(30, 1, 3), split(90, 2, 3)
    rows = draw_shots(train.targets, 3, 4, seed=1)
    assert torch.bincount(train.targets[rows]).tolist() == [4, 4, 4]
    assert set(draw_shots(train.targets, 3, 2, seed=1).tolist()) < set(rows.tolist())
    assert rows.tolist() != draw_shots(train.targets, 3, 4, seed=2).tolist()
    one, many = few_shot(train, validation, test, 3, (1, 16), seeds=3)
    assert (one.shots, many.shots, len(one.values)) == (1, 16, 3)
    assert one.mean < many.mean
    expected = stats.ttest_1samp(many.values, 0).confidence_interval()
    assert (many.low, many.high) == pytest.approx((expected.low, expected.high))
    assert few_shot(train, validation, test, 3, (1,), seeds=1)[0].low is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: LogisticRegression(x, torch.tensor([0, 1, 3]), 3), "label 3 of picture 2 is out of range"),
        (lambda x: LogisticRegression(x, torch.tensor([0, 2, 2]), 3), "class 1 of 3 has no samples to fit"),
        (lambda x: LogisticRegression(x, torch.tensor([0, 1]), 2), "3 rows of features with 2 labels"),
        (lambda x: LogisticRegression(x * torch.nan, torch.tensor([0, 1, 1]), 2), "not finite"),
        (lambda x: LogisticRegression(x, torch.tensor([0, 0, 0]), 1), "at least 2 classes"),
        (lambda x: LogisticRegression(x, torch.ones(3, 2) > 0, 2), "alike in class 0 of 2"),
        (lambda x: LogisticRegression(x, torch.tensor([0, 1, 1]), 2).fit(0), "must be above 0, got 0"),
        (lambda x: draw_shots(torch.tensor([0, 0, 1]), 2, 2, 0), "class 1 has 1 samples, fewer than 2 shots"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call(torch.eye(3))
