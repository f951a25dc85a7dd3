"""What is shipped with a job, what it may name, and whether a cluster has room for it; the cluster is in tests/e2e."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.config import BenchmarkConfig
from rayclip.cli import submit
from rayclip.config import ClassifyConfig, CompareConfig, EmbedConfig, FitConfig, IndexConfig, TrainConfig
from rayclip.errors import UserError
from rayclip.orchestration.cluster.resources import Capacity, most_of, resource_request, shortage
from rayclip.orchestration.cluster.runtime_env import check_config, check_paths, pack

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shipment():
    return pack(ROOT)


def test_the_library_and_the_jobs_are_shipped_whole_and_little_else(shipment):
    command = ["git", "ls-files", "-co", "--exclude-standard", "platform/rayclip", "jobs", "serve"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in git")
    there = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}  # serve is a link
    assert "platform/rayclip/data/bpe_merges.txt.gz" in there
    assert there <= shipment.files
    assert {Path(name).parts[0] for name in shipment.files if "/" in name} <= {"platform", "jobs", "serve"}
    assert not [name for name in shipment.files if name.endswith(".pyc")]
    assert 100_000 < shipment.num_bytes < 10_000_000


def test_what_is_shipped_runs_by_itself(shipment, tmp_path):
    for name in shipment.files:
        target = tmp_path / name.replace("platform/", "modules/", 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    code = (
        "import rayclip, rayclip.cli.command, rayclip.serve.config; from rayclip.data.tokenizer import get_tokenizer;"
        "print(len(get_tokenizer(16)(['a dog'])), rayclip.__file__, rayclip.cli.command.__file__, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, library, job = done.stdout.splitlines()
    assert library == str(tmp_path / "modules/rayclip/__init__.py")
    assert job == str(tmp_path / "jobs/cli.py")


def make_train(**sections):
    values = {
        "name": "run",
        "runs": "/shared/runs",
        "model": "ViT-B/32",
        "data": {"path": "/shared/data"},
        "epochs": 1,
        "batch_size": 8,
        "tracking": {"uri": "http://mlflow:5000"},
    }
    for key, value in sections.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return TrainConfig.model_validate(values)


def check(config, shipment, summary="/shared/summary.json"):
    return check_paths(config, summary, shipment, ROOT)


def test_what_lies_on_shared_storage_is_named(shipment):
    tasks = {"one": {"kind": "retrieval", "path": "s3://bucket/data"}}
    assert check(make_train(evaluation={"tasks": tasks}), shipment) == ["/shared/data", "/shared/runs"]
    assert check(make_train(weights="platform/rayclip/recipes"), shipment) == [
        "/shared/data",
        "/shared/runs",
    ]  # it is shipped
    assert check(make_train(weights="models:/clip@champion"), shipment) == ["/shared/data", "/shared/runs"]
    assert check(make_train(tracking={"uri": "sqlite:////shared/mlflow.db"}), shipment)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"path": "data/table/train"}}, "data.path is 'data/table/train', which is not shipped"),
        ({"weights": "tests/unit"}, "weights is 'tests/unit', which is not shipped"),
        ({"evaluation": {"tasks": {"a": {"kind": "retrieval", "path": "x"}}}}, "evaluation.tasks.a.path is 'x', which"),
        ({"tracking": {"uri": None}}, "tracking.uri: a job on a cluster needs the URI of an MLflow server"),
        ({"tracking": {"uri": "sqlite:///mlflow.db"}}, "tracking.uri: a job on a cluster needs the URI"),
    ],
)
def test_what_lies_on_this_machine_alone_is_refused(shipment, sections, said):
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        check(make_train(**sections), shipment)
    assert "\n" not in str(refused.value)


def test_what_would_go_with_the_job_s_folder_is_refused(shipment):
    with pytest.raises(UserError, match=r"would write 'runs/run/summary.json' .* runs: give an absolute path"):
        check(make_train(runs="runs"), shipment, "runs/run/summary.json")
    with pytest.raises(UserError, match=r"output: give an absolute path"):
        check(FitConfig(source="/shared/runs.csv"), shipment, "runs/fits/runs/summary.json")
    with pytest.raises(UserError, match=r"--json: give an absolute path"):
        check(BenchmarkConfig(name="loss"), shipment, "runs/benchmarks/loss.json")
    registered = EmbedConfig(model="models:/clip@champion", data="/shared/data", output="/shared/out")
    with pytest.raises(UserError, match="tracking_uri: a job on a cluster needs"):
        check(registered, shipment)


def test_a_config_outside_the_tree_is_refused(shipment):
    check_config(["platform/rayclip/recipes/demo.yaml", "name=x.yaml"], shipment)
    for path in ("/tmp/mine.yaml", "runs/mine.yaml"):
        with pytest.raises(UserError, match=f"config '{path}' is not in the tree"):
            check_config([path], shipment)


def test_every_path_of_a_job_is_looked_for_whatever_its_key(shipment):
    report = {"output": "/shared/out", "runs": ("/shared/a", "runs/b")}
    with pytest.raises(UserError, match="runs is 'runs/b', which is not shipped with the job"):
        check(CompareConfig.model_validate(report), shipment)
    classify = {"model": "/shared/m", "data": "/shared/data", "output": "/shared/out"}
    assert check(ClassifyConfig.model_validate(classify | {"labels": ["tests", "docs"]}), shipment)
    with pytest.raises(UserError, match=r"labels is 'labels.txt', which is not shipped"):
        check(ClassifyConfig.model_validate(classify | {"labels": "labels.txt"}), shipment)
    # A name is a path only where something lies at it.
    assert check(FitConfig(source="an experiment", output="/shared/out", tracking_uri="http://mlflow"), shipment)
    with pytest.raises(UserError, match="source is 'tests/unit', which is not shipped"):
        check(FitConfig(source="tests/unit", output="/shared/out"), shipment)


def test_an_output_is_shared_even_where_the_summary_is(shipment):
    with pytest.raises(UserError, match=r"would write 'out' into a folder that is removed with it: output: give an"):
        check(EmbedConfig(model="/shared/m", data="/shared/data", output="out"), shipment)
    with pytest.raises(UserError, match=r"would write 'kept' .* tracking.artifacts: give an absolute path"):
        check(make_train(tracking={"artifacts": "kept"}), shipment)


def test_the_errors_are_the_job_s_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"no job 'trian': did you mean 'train'\?"):
        submit.read_settings("trian", [])
    with pytest.raises(UserError, match="unknown key 'chunk_sample': did you mean 'chunk_samples'"):
        submit.read_settings("index", ["data/mine", "chunk_sample=1"])
    found = submit.read_settings("index", ["/shared/data", "chunk_samples=32"])
    given = {"path": "/shared/data", "chunk_samples": 32}
    assert found == {
        "kind": "IndexConfig",
        "summary": "/shared/data/index.json",
        "config": IndexConfig.model_validate(given).model_dump(mode="json"),
    }


def test_a_cluster_is_asked_by_its_address_alone(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="give the address of the cluster"):
        submit.command(["list"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9"):
        submit.command(["list"])
    with pytest.raises(UserError, match="status takes one ID"):
        submit.look(None, "status", [])


# --- room


def test_what_a_job_takes():
    gpus = make_train(cluster={"num_workers": 2, "cpus_per_worker": 4, "use_gpu": True})
    assert resource_request(gpus) == [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}, {"CPU": 1}]
    embed = EmbedConfig(model="m", data="d", output="o", cluster={"num_workers": 3})
    assert resource_request(embed) == [{"CPU": 1}] * 3
    assert resource_request(FitConfig(source="points.csv")) == [{"CPU": 1}]


def test_what_measures_beside_training_takes_its_own():
    evaluation = {"tasks": {"a": {"kind": "retrieval", "path": "a"}}, "every_samples": 8, "asynchronous": True}

    def beside(use_gpu=False, **changes):
        cluster = {"num_workers": 2, "cpus_per_worker": 4, "use_gpu": use_gpu}
        return resource_request(make_train(cluster=cluster, evaluation=evaluation | changes))[3:]

    assert beside() == [{"CPU": 1}]
    assert beside(validation_cpus=3) == [{"CPU": 3}]
    assert beside(use_gpu=True) == [{"CPU": 1, "GPU": 1}]
    assert beside(use_gpu=True, validation_gpus=0, validation_cpus=8) == [{"CPU": 8}]
    assert beside(validation_gpus=0.5) == [{"CPU": 1, "GPU": 0.5}]
    for nothing in ({"asynchronous": False}, {"every_samples": None}, {"tasks": {}}):
        assert beside(**nothing) == []
    job = resource_request(make_train(cluster={"num_workers": 2, "use_gpu": True}, evaluation=evaluation))
    assert "it needs 4 CPU, 3 GPU" in shortage(job, Capacity([{"CPU": 8, "GPU": 2}], {}))


def test_what_is_missing_is_said():
    job = resource_request(make_train(cluster={"num_workers": 2, "cpus_per_worker": 4, "use_gpu": True}))
    gpu, cpu = {"CPU": 8, "GPU": 2}, {"CPU": 4}
    assert shortage(job, Capacity([gpu, cpu], {})) is None
    assert shortage(job, Capacity([gpu], {})) == (
        "it needs 9 CPU, 2 GPU, up to 4 CPU, 1 GPU on one node; the cluster has 8 CPU, 2 GPU on 1 node"
    )
    assert "the cluster has 16 CPU, 0 GPU on 4 nodes" in shortage(job, Capacity([cpu] * 4, {}))
    # Enough in all, and on no node.
    assert shortage(resource_request(make_train(cluster={"cpus_per_worker": 4})), Capacity([{"CPU": 3}] * 4, {}))


def test_a_cluster_that_grows_is_waited_for():
    job = resource_request(make_train(cluster={"num_workers": 2, "use_gpu": True}))
    most = most_of([{"ray.io/node-id": "a"}, {"rayclip/max-cpus": "320", "rayclip/max-gpus": "16"}])
    assert most == {"CPU": 320, "GPU": 16}
    assert shortage(job, Capacity([{"CPU": 0}], most)) is None
    assert "which may grow to 320 CPU, 1 GPU" in shortage(job, Capacity([{"CPU": 0}], {"CPU": 320, "GPU": 1}))


@given(
    nodes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 2)), min_size=1, max_size=3),
    workers=st.integers(1, 3),
    cpus=st.integers(1, 3),
    gpu=st.booleans(),
)
def test_room_is_found_where_trying_every_way_finds_it(nodes, workers, cpus, gpu):
    has = [{"CPU": float(c), "GPU": float(g)} for c, g in nodes]
    job = resource_request(
        make_train(batch_size=6, cluster={"num_workers": workers, "cpus_per_worker": cpus, "use_gpu": gpu})
    )
    ways = itertools.product(range(len(has)), repeat=len(job))
    possible = any(
        all(
            sum(bundle.get(name, 0) for bundle, at in zip(job, way, strict=True) if at == i) <= node[name]
            for i, node in enumerate(has)
            for name in ("CPU", "GPU")
        )
        for way in ways
    )
    assert (shortage(job, Capacity(has, {})) is None) == possible
