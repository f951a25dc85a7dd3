"""When a new version takes the alias: against a real embedded MLflow database, with the figures on the version."""

import json

import pytest

from rayclip.config import TrackingConfig
from rayclip.tracking.mlflow import connect
from rayclip.tracking.promotion import Measured, promote


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    return connect(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


@pytest.fixture
def add(client, request):
    """Registers a version of the test's own model and asks for the alias; the decision."""
    name = request.node.name
    client.create_registered_model(name)

    def add(top1, metric="letters.top1", digest="a", other=0.5, **settings):
        version = client.create_model_version(name, "file:///nowhere")
        config = TrackingConfig(register_as=name, **settings)
        measured = {
            "letters": Measured(digest, {"top1": top1, "num_samples": 400}),
            "words": Measured(digest, {"image_to_text": {"recall_at_1": other}, "num_images": 900, "num_texts": 900}),
        }
        return promote(client, config, int(version.version), measured, metric)

    add.alias = lambda: int(client.get_model_version_by_alias(name, "champion").version)
    add.tags = lambda number: client.get_model_version(name, str(number)).tags
    return add


def test_worse_equal_better_and_measured_on_other_data(add):
    decisions = [add(0.567), add(0.397), add(0.567), add(0.6), add(0.9, digest="b")]
    assert [(d.version, d.outcome, d.reason) for d in decisions] == [
        (1, "promoted", "it is the first 'champion'"),
        (2, "not promoted", "letters.top1 39.7% is worse than version 1's 56.7%"),
        (3, "not promoted", "letters.top1 56.7% is equal to version 1's 56.7%"),
        (4, "promoted", "letters.top1 60.0% is better than version 1's 56.7%"),
        (5, "not promoted", "letters.top1 was measured on other data than version 4's"),
    ]
    assert add.alias() == 4
    tags = add.tags(2)
    assert tags["promotion"] == "not promoted"
    assert tags["promotion.reason"] == decisions[1].reason
    assert (tags["promotion.metric"], tags["promotion.value"], tags["promotion.value_against"]) == (
        "letters.top1", "0.397", "0.567"
    )  # fmt: skip
    assert (tags["promotion.against"], tags["promotion.alias"]) == ("1", "champion")
    assert json.loads(tags["measured"])["letters"] == {"digest": "a", "metrics": {"top1": 0.397, "num_samples": 400}}


def test_always_and_never(add):
    add(0.9)
    assert add(0.1, promote="always").outcome == "promoted"
    assert add.alias() == 2
    assert add(0.99, promote="never").reason == "tracking.promote is never"
    assert add.alias() == 2


def test_never_leaves_a_model_without_an_alias(add, client):
    assert add(0.9, promote="never").outcome == "not promoted"
    assert not client.get_registered_model("test_never_leaves_a_model_without_an_alias").aliases


def test_a_version_of_an_earlier_release_has_no_figures_to_compare_with(add, client):
    name = "test_a_version_of_an_earlier_release_has_no_figures_to_compare_with"
    client.create_model_version(name, "file:///nowhere")
    client.set_registered_model_alias(name, "champion", "1")
    assert add(0.9).reason == "version 1 has no record of letters.top1"
    assert add(0.9, promote="always").outcome == "promoted"


def test_a_run_that_measured_nothing_takes_no_alias_from_another(add):
    add(0.5)
    assert add(0.9, metric=None).reason == "nothing was measured that versions could be compared by"


def test_the_gate_holds_a_version_that_may_have_lost_elsewhere(add):
    gate = {"words.image_to_text.recall_at_1": 0.05}
    add(0.5, other=0.6)
    decision = add(0.7, other=0.58, gate=gate)
    (result,) = decision.gate
    assert decision.outcome == "not promoted"
    assert decision.reason.startswith("gate: words.image_to_text.recall_at_1 changes by -2.0% [-6.5%, +2.5%], and may")
    # Two shares of 900 samples: the normal interval of their difference, which is a hair wider here.
    assert result.low == pytest.approx(-0.02 - 1.96 * (0.6 * 0.4 / 900 + 0.58 * 0.42 / 900) ** 0.5, abs=2e-4)
    assert add.alias() == 1
    assert add(0.7, other=0.62, gate=gate).outcome == "promoted"


def test_a_gate_on_what_was_not_measured_promotes_nothing(add):
    add(0.5)
    assert add(0.9, gate={"letters.top5": 0.1}).reason == "gate: letters.top5 was not measured"


def test_a_version_that_has_the_alias_keeps_it(add, client):
    add(0.5)
    config = TrackingConfig(register_as="test_a_version_that_has_the_alias_keeps_it")
    again = promote(client, config, 1, {"letters": Measured("a", {"top1": 0.5, "num_samples": 4})}, "letters.top1")
    assert (again.outcome, again.reason) == ("promoted", "it is 'champion' already")
