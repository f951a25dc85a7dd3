"""Versions of a registered model behind a running service: swapped, rolled back, tried on a share, under load."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rayclip.inference.prompts import TEMPLATES
from rayclip.tracking.mlflow import connect
from rayclip.tracking.registry import link_checkpoint, move_alias, register
from tests.serve.load import Load


@pytest.fixture(scope="module")
def registry(tmp_path_factory, write_model):
    """A database with versions 1 (champion), 2 and 3 of a model; gives its URI."""
    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = connect(uri)
    experiment = client.create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
    run = client.create_run(experiment, run_name="tiny").info.run_id
    for seed in (1, 2, 3):
        measured = {"tasks": {"seen": {"kind": "zero_shot", "path": "data", "templates": "glyphs"}}}
        settings = {"evaluation": measured} if seed == 3 else {}
        checkpoint = write_model(folder / f"checkpoint-{seed}", seed, **settings)
        model = link_checkpoint(client, run, checkpoint, seed, {})
        number = register(client, model, checkpoint, "tiny")
        move_alias(client, "tiny", "champion" if seed == 1 else f"other-{seed}", number)
    return uri


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"RAYCLIP_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def service(start_service, registry, cache):
    return start_service(
        "model=models:/tiny@champion",
        f"tracking_uri={registry}",
        "poll_s=0.3",
        "retire_s=10",
        "image_encoder.min_replicas=2",
        "image_encoder.max_replicas=2",
        environment=cache,
    )


def until(condition, what, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def serving(service):
    return {model["id"] for model in service.ask("GET", "/v1/models")[1]["data"] if model["state"] == "serving"}


def test_moving_the_alias_swaps_the_model_with_no_failed_request(service, registry, cache, encoded):
    body = {"image": encoded(1), "labels": ["a cat", "a dog"]}
    client = MlflowClient(registry)
    before = service.post("/v1/zero-shot", body)
    assert before["model"] == "tiny/1"
    with Load(f"{service.url}/v1/zero-shot", body, rate=20) as load:
        time.sleep(1)
        client.set_registered_model_alias("tiny", "champion", "2")
        until(lambda: serving(service) == {"tiny/2"}, "version 2 takes over")
        time.sleep(2)
        done = subprocess.run(
            [sys.executable, "-m", "serve", "rollback", "models:/tiny@champion", f"tracking_uri={registry}"],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout) == (0, "models:/tiny@champion: version 2 -> 1\n"), done.stderr
        until(lambda: serving(service) == {"tiny/1"}, "version 1 is back")
        time.sleep(2)
    assert set(load.statuses()) == {200}
    models = load.models()
    assert Counter(models).keys() == {"tiny/1", "tiny/2"}
    assert (models[0], models[-1]) == ("tiny/1", "tiny/1")
    assert service.post("/v1/zero-shot", body) == before
    until(lambda: {m["id"] for m in service.ask("GET", "/v1/models")[1]["data"]} == {"tiny/1"}, "2 is let go of")


def test_each_version_answers_by_itself_while_both_are_loaded(service, registry, encoded):
    body = {"image": encoded(1), "labels": ["a cat", "a dog"], "scores": "cosine"}
    client = MlflowClient(registry)
    first = service.post("/v1/zero-shot", body)
    client.set_registered_model_alias("tiny", "champion", "3")
    # Not from the moment on when the coordinator says so: each ingress replica hears of it with its next report.
    until(lambda: service.post("/v1/zero-shot", body)["model"] == "tiny/3", "version 3 answers")
    third = service.post("/v1/zero-shot", body)
    assert (first["model"], third["model"]) == ("tiny/1", "tiny/3")
    assert first["results"] != third["results"]
    # The one that was replaced still answers those who name it, with its own features and its own class matrix.
    assert service.post("/v1/zero-shot", {**body, "model": "tiny/1"}) == first
    until(lambda: service.ask("POST", "/v1/zero-shot", {**body, "model": "tiny/1"})[0] == 404, "1 is let go of")
    client.set_registered_model_alias("tiny", "champion", "1")
    until(lambda: service.post("/v1/zero-shot", body)["model"] == "tiny/1", "version 1 is back")


def test_labels_are_put_into_what_the_model_was_measured_with(service, registry, encoded):
    body = {"image": encoded(1), "labels": ["a cat", "a dog"]}
    assert service.ask("GET", "/v1/templates")[1]["default"] == list(TEMPLATES["photo_ensemble"])
    client = MlflowClient(registry)
    client.set_registered_model_alias("tiny", "champion", "3")
    try:
        until(lambda: service.post("/v1/zero-shot", body)["model"] == "tiny/3", "version 3 answers")
        assert service.ask("GET", "/v1/templates")[1]["default"] == list(TEMPLATES["glyphs"])  # what the page shows
        assert service.post("/v1/zero-shot", body)["templates"] == list(TEMPLATES["glyphs"])
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
    until(lambda: service.post("/v1/zero-shot", body)["model"] == "tiny/1", "version 1 is back")
    assert service.post("/v1/zero-shot", body)["templates"] == list(TEMPLATES["photo_ensemble"])


def figure(service, name):
    """The value of a figure of /metrics, or None."""
    lines = service.ask("GET", "/metrics")[1].decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), None)


@pytest.mark.parametrize("kind", ["cut off", "of another model"])
def test_a_version_that_cannot_be_loaded_never_takes_over_and_is_named(
    service, registry, tmp_path, write_model, encoded, kind
):
    client = MlflowClient(registry)
    run = client.get_model_version("tiny", "1").run_id
    checkpoint = write_model(tmp_path / "damaged", 9)
    if kind == "cut off":  # found as it is fetched
        whole = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:  # found as it is loaded
        config = json.loads((checkpoint / "config.json").read_text())
        config["model"]["embed_dim"] *= 2
        (checkpoint / "config.json").write_text(json.dumps(config))
    step = {"cut off": 9, "of another model": 10}[kind]
    number = register(client, link_checkpoint(client, run, checkpoint, step, {}), checkpoint, "tiny")
    client.set_registered_model_alias("tiny", "champion", str(number))
    name = f"tiny/{number}"
    body = {"image": encoded(1), "labels": ["a cat", "a dog"]}

    def failed():
        models = {each["id"]: each for each in service.ask("GET", "/v1/models")[1]["data"]}
        return models.get(name, {}).get("state") == "failed" and models[name]

    try:
        with Load(f"{service.url}/v1/zero-shot", body, rate=10) as load:
            until(failed, "it is named as failed")
            assert failed()["error"] and failed()["share"] == 0
            assert service.ask("GET", f"/v1/models/{name}")[1]["state"] == "failed"
            assert figure(service, f'rayclip_model_failed{{model="{name}"') == 1
            until(lambda: f"warning: {name} cannot be served: " in service.log.read_text(), "the log says it")
            time.sleep(1)
    finally:
        client.set_registered_model_alias("tiny", "champion", "1")
    assert set(load.statuses()) == {200}
    assert set(load.models()) == {"tiny/1"}
    until(lambda: f"over: {name} cannot be served: " in service.log.read_text(), "the log says that it is over", 90)


@pytest.mark.parametrize("kind", ["a deleted alias", "a lost registry"])
def test_a_registry_that_cannot_be_followed_is_said_and_changes_nothing(service, registry, encoded, kind):
    client = MlflowClient(registry)
    database = Path(registry.removeprefix("sqlite:///"))
    body = {"image": encoded(1), "labels": ["a cat", "a dog"]}
    log_before = service.log.read_text().count("warning: champion stays as it is")

    def notices():
        return service.ask("GET", "/v1/models")[1].get("warnings", [])

    assert notices() == []
    if kind == "a deleted alias":
        client.delete_registered_model_alias("tiny", "champion")
    else:
        database.rename(database.with_suffix(".away"))
    try:
        until(notices, "it is said")
        (notice,) = notices()
        assert (notice["code"], notice["params"]) == ("registry_not_followed", ["champion"])
        assert ("has no alias 'champion'" if kind == "a deleted alias" else "MLflow") in notice["message"]
        assert figure(service, 'rayclip_registry_up{replica="coordinator",role="champion"') == 0
        assert figure(service, 'rayclip_registry_age_seconds{replica="coordinator",role="champion"') > 0
        assert service.post("/v1/zero-shot", body)["model"] == "tiny/1"
        assert service.ask("GET", "/healthz")[0] == 200
        until(lambda: service.log.read_text().count("warning: champion stays") > log_before, "the log says it")
    finally:
        if kind == "a deleted alias":
            client.set_registered_model_alias("tiny", "champion", "1")
        else:
            database.with_suffix(".away").replace(database)
    until(lambda: notices() == [], "it is over")
    assert figure(service, 'rayclip_registry_up{replica="coordinator",role="champion"') == 1


@pytest.mark.chaos
def test_killing_a_replica_under_load_loses_no_request(service, encoded):
    body = {"image": encoded(1), "labels": ["a cat", "a dog"]}
    with Load(f"{service.url}/v1/zero-shot", body, rate=20) as load:
        for deployment in ("ImageEncoder", "TextEncoder", "Ingress", "Coordinator"):
            before = {process.pid for process in service.replicas(deployment)}
            victim = service.replicas(deployment)[0]
            victim.kill()
            until(
                lambda deployment=deployment, before=before: (
                    len({p.pid for p in service.replicas(deployment)} - before) == 1
                ),
                f"{deployment} is back",
            )
            until(lambda: service.ask("GET", "/healthz")[0] == 200, "it answers again")
            time.sleep(1)
    assert set(load.statuses()) == {200}, [answer for answer in load.answers if answer[1] != 200]


def test_a_canary_gets_its_share(start_service, registry, cache, encoded):
    service = start_service(
        "model=models:/tiny/1",
        "canary=models:/tiny/2",
        "canary_share=0.25",
        f"tracking_uri={registry}",
        environment=cache,
    )
    try:
        body = {"image": encoded(1), "labels": ["a cat", "a dog"]}
        counts = Counter(service.post("/v1/zero-shot", body)["model"] for _ in range(300))
        assert counts.keys() == {"tiny/1", "tiny/2"}
        # Five standard deviations of a binomial.
        assert abs(counts["tiny/2"] / 300 - 0.25) < 5 * (0.25 * 0.75 / 300) ** 0.5
        assert service.post("/v1/zero-shot", {**body, "model": "tiny/2"})["model"] == "tiny/2"
    finally:
        service.stop()
