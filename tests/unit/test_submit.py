"""What is shipped with a job, what it may name, and whether a cluster has room for it; the cluster is in tests/e2e."""

import itertools
import json
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
from rayclip.config import (
    ClassifyConfig,
    CompareConfig,
    EmbedConfig,
    FitConfig,
    IndexConfig,
    IngestConfig,
    SuiteConfig,
    TrainConfig,
)
from rayclip.errors import UserError
from rayclip.orchestration.cluster.resources import Capacity, most_of, resource_request, shortage
from rayclip.orchestration.cluster.runtime_env import check_caches, check_paths, local_inputs, packed_files

ROOT = Path(__file__).resolve().parents[2]


LIBRARY = ROOT / "platform/rayclip"


def test_the_library_is_shipped_whole_and_little_else():
    command = ["git", "ls-files", "-co", "--exclude-standard", "platform/rayclip", "serve"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not in git")
    there = {name.removeprefix("platform/rayclip/") for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    assert {"data/bpe_merges.txt.gz", "recipes/demo.yaml", "serve/app.py", "serve/page/index.html"} <= there
    files, num_bytes = packed_files(LIBRARY)
    assert files == there
    assert 100_000 < num_bytes < 10_000_000


def test_what_is_shipped_runs_by_itself(tmp_path):
    for name in packed_files(LIBRARY)[0]:
        target = tmp_path / "modules/rayclip" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(LIBRARY / name, target)
    code = (
        "import rayclip, rayclip.cli.command, rayclip.serve.config; from rayclip.data.tokenizer import get_tokenizer;"
        "print(len(get_tokenizer(16)(['a dog'])), rayclip.__file__, rayclip.serve.config.__file__, sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, library, service = done.stdout.splitlines()
    assert library == str(tmp_path / "modules/rayclip/__init__.py")
    assert service == str(tmp_path / "modules/rayclip/serve/config.py")
    command = [sys.executable, "-m", "rayclip", "ingest", "ingest_glyphs", "output=x", "--check"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout)["config"]["output"] == "x", done.stderr


def test_the_job_finds_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.yaml").write_text("name: mine")
    target = tmp_path / "job"
    target.mkdir()
    for path in ("configs/mine.yaml", str(tmp_path / "configs/mine.yaml")):
        assert submit.ship_config("train", [path, "seed=1"], target) == ["mine.yaml", "seed=1"]
        assert (target / "mine.yaml").read_text() == "name: mine"
        (target / "mine.yaml").unlink()
    assert submit.ship_config("evaluate", ["m", "configs/mine.yaml"], target) == ["m", "mine.yaml"]
    (target / "mine.yaml").unlink()
    # A recipe is in the package, and some commands have no config.
    assert submit.ship_config("train", ["demo", "seed=1"], target) == ["demo", "seed=1"]
    assert submit.ship_config("index", ["/shared/data", "chunk_samples=2"], target) == [
        "/shared/data",
        "chunk_samples=2",
    ]
    assert not list(target.iterdir())
    # The former paths of recipes are no files any more.
    assert submit.ship_config("train", ["jobs/configs/demo.yaml"], target) == ["demo.yaml"]
    assert (target / "demo.yaml").read_bytes() == (LIBRARY / "recipes/demo.yaml").read_bytes()


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


def check(config, folder, summary="/shared/summary.json"):
    problems, shared = check_paths(config, summary, local_inputs(config, folder), folder)
    assert not problems
    return shared


def problem(config, folder, summary="/shared/summary.json"):
    (line,), _ = check_paths(config, summary, local_inputs(config, folder), folder)
    assert "\n" not in line
    return line


def test_what_lies_on_shared_storage_is_named(tmp_path):
    tasks = {"one": {"kind": "retrieval", "path": "s3://bucket/data"}}
    shared = ["/shared/data", "/shared/runs"]
    assert check(make_train(evaluation={"tasks": tasks}), tmp_path) == shared
    assert check(make_train(weights="models:/clip@champion"), tmp_path) == shared
    assert check(make_train(tracking={"uri": "sqlite:////shared/mlflow.db"}), tmp_path)


def test_files_that_a_config_names_travel_with_it(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words/classes.txt").write_text("a\nb\n")
    (tmp_path / "pairs.csv").write_text("filepath,title\n")
    values = {"model": "/m", "data": "/shared/data", "output": "/shared/out", "templates": "glyphs"}
    labelled = ClassifyConfig(labels="words/classes.txt", **values)
    assert local_inputs(labelled, tmp_path) == ["words/classes.txt"]
    assert check(labelled, tmp_path) == ["/m", "/shared/data", "/shared/out"]
    assert local_inputs(ClassifyConfig(labels=["a", "words"], **values), tmp_path) == []
    assert local_inputs(ClassifyConfig(labels="../words/classes.txt", **values), tmp_path / "words") == []
    # A table is read with the pictures that it names.
    table = IngestConfig.model_validate({"source": {"kind": "table", "path": "pairs.csv"}, "output": "/shared/out"})
    assert problem(table, tmp_path).startswith("source.path is 'pairs.csv', which is not shipped")
    with (tmp_path / "words/classes.txt").open("r+b") as file:
        file.truncate(30_000_000)
    assert "words/classes.txt would travel with the job, and are 30 MB" in problem(labelled, tmp_path)


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
def test_what_lies_on_this_machine_alone_is_refused(sections, said):
    assert said in problem(make_train(**sections), ROOT)


def test_what_would_go_with_the_job_s_folder_is_refused(tmp_path):
    line = problem(make_train(runs="runs"), tmp_path, "runs/run/summary.json")
    assert re.search(r"would write 'runs' into .* runs: give an absolute path", line)
    for summary in ("runs/fits/runs/summary.json", f"{tmp_path}/runs/fits/runs/summary.json"):
        assert "output: give an absolute path" in problem(FitConfig(source="/shared/runs.csv"), tmp_path, summary)
    # Below this folder, and all nodes may share that.
    assert check(FitConfig(source="/shared/runs.csv", output=f"{tmp_path}/fit"), tmp_path, f"{tmp_path}/fit/s.json")
    line = problem(BenchmarkConfig(name="loss"), tmp_path, "runs/benchmarks/loss.json")
    assert "--json: give an absolute path" in line
    registered = EmbedConfig(model="models:/clip@champion", data="/shared/data", output="/shared/out")
    assert "tracking_uri: a job on a cluster needs" in problem(registered, tmp_path)


def test_all_that_is_wrong_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as refused:
        submit.command(["train", "demo"])
    first, *lines = str(refused.value).splitlines()
    assert first == "this cannot be submitted, for 6 reasons:"
    starts = ["the job would write 'runs' into", "tracking.uri: ", "data.path is 'data/glyphs/train'"]
    starts += ["evaluation.tasks.held_out_font.path is", "evaluation.tasks.unseen_combinations.path is"]
    assert all(line.startswith(f"  {start}") for line, start in zip(lines, starts, strict=False)), lines
    assert lines[-1] == "  give the address of the cluster: --address http://HEAD:8265, or RAY_API_SERVER_ADDRESS"


def test_every_path_of_a_job_is_looked_for_whatever_its_key(tmp_path):
    report = {"output": "/shared/out", "runs": ("/shared/a", "runs/b")}
    line = problem(CompareConfig.model_validate(report), tmp_path)
    assert line.startswith("runs is 'runs/b', which is not shipped with the job")
    classify = {"model": "/shared/m", "data": "/shared/data", "output": "/shared/out"}
    assert check(ClassifyConfig.model_validate(classify | {"labels": ["tests", "docs"]}), ROOT)
    line = problem(ClassifyConfig.model_validate(classify | {"labels": "labels.txt"}), tmp_path)
    assert line.startswith("labels is 'labels.txt', which is not shipped")
    # A name is a path only where something lies at it.
    assert check(FitConfig(source="an experiment", output="/shared/out", tracking_uri="http://mlflow"), ROOT)
    line = problem(FitConfig(source="tests/unit", output="/shared/out"), ROOT)
    assert line.startswith("source is 'tests/unit', which is not shipped")


def test_an_output_is_shared_even_where_the_summary_is(tmp_path):
    line = problem(EmbedConfig(model="/shared/m", data="/shared/data", output="out"), tmp_path)
    assert "would write 'out' into a folder that is removed with it: output: give an" in line
    line = problem(make_train(tracking={"artifacts": "kept"}), tmp_path)
    assert re.search(r"would write 'kept' .* tracking.artifacts: give an absolute path", line)


def test_a_cache_that_each_node_would_have_for_itself_is_refused():
    suite = {"model": "/m", "name": "s", "datasets": {"a": {}}}
    (line,) = check_caches(SuiteConfig.model_validate(suite))
    assert line.startswith("cache is 'runs/features', of which each node has its own: give an absolute path")
    assert not check_caches(SuiteConfig.model_validate({**suite, "cache": "s3://b/features"}))


def test_the_errors_are_the_job_s_own():
    with pytest.raises(UserError, match=r"no command 'trian' to submit: did you mean 'train'\?"):
        submit.read_settings("trian", [])
    with pytest.raises(UserError, match="unknown key 'chunk_sample': did you mean 'chunk_samples'"):
        submit.read_settings("index", ["data/mine", "chunk_sample=1"])
    config, summary = submit.read_settings("index", ["/shared/data", "chunk_samples=32"])
    assert config == IndexConfig.model_validate({"path": "/shared/data", "chunk_samples": 32})
    assert summary == "/shared/data/index.json"
    assert submit.read_settings("index", ["/shared/data", "--json", "s3://b/x.json"]).summary == "s3://b/x.json"


def test_a_cluster_is_asked_by_its_address_alone(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="give the address of the cluster"):
        submit.command(["list"])
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"no Ray cluster answers at http://127\.0\.0\.1:9"):
        submit.command(["list"])
    with pytest.raises(UserError, match="status takes one ID"):
        submit.show(None, "status", [])


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
