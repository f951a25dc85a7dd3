"""What people get wrong with `python -m jobs.train`: exit code 2 and one line: what, where, what instead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayclip.cli import train as train_job
from rayclip.cli.command import run_and_exit
from rayclip.config import TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.orchestration.train.plan import resolve
from rayclip.orchestration.train.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def values(tmp_path, monkeypatch, tiny_config, make_samples, write_dataset):
    """A config that would train, in the working directory as train.yaml."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "data", make_samples(30))
    values = {
        "name": "run",
        "model": tiny_config.model_dump(mode="json"),
        "data": {"path": "data"},
        "epochs": 1,
        "batch_size": 10,
    }
    (tmp_path / "train.yaml").write_text(json.dumps(values))
    return values


@pytest.fixture
def train(values, monkeypatch, capsys):
    """Runs the job's command line in this process; gives the line that follows `error: `."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rayclip", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_and_exit(train_job.command)
        output = capsys.readouterr()
        assert output.out == ""
        return only_error(caught.value.code, output.err)

    return run


def only_error(code, stderr):
    assert code == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr': did you mean 'lr'?"),
        ("optimiser.lr=1", "unknown key 'optimiser': did you mean 'optimizer'?"),
        ("evaluation.tasks.faces={kind: zero_shoot, path: data}", "'zero_shot', 'retrieval'"),
        ("batch_size=many", "'batch_size' is 'many': input should be a valid integer"),
        ("batch_size=0", "'batch_size' is 0: input should be greater than 0"),
        ("optimizer=3", "'optimizer' is 3"),
        ("data.max_bad_fraction=2", "less than or equal to 1"),
        ("samples=100", "give exactly one of epochs and samples"),
        ("name=../run", "'name' is '../run'"),
        ("cluster.num_workers=3", "batch_size 10 is not a multiple of cluster.num_workers 3"),
        ("evaluation.best=faces.top1", "evaluation.best 'faces.top1' is not measured; measured: "),
        ("model=ViT-B/23", "no model is called 'ViT-B/23': did you mean 'ViT-B/32'?"),
        ("nonsense", "'nonsense' is not of the form key=value"),
        ("data.path=elsewhere", "elsewhere': the folder does not exist"),
        ("batch_size=31", "batch_size 31 is larger than the data set in"),
        ("model.text.vocab_size=1000", "model.text.vocab_size 1,000 is below the tokenizer's 49,408"),
        ("evaluation.tasks.faces={kind: zero_shot, path: elsewhere}", "elsewhere': the folder does not exist"),
        ("evaluation.tasks.faces={kind: zero_shot, path: data}", "zero-shot needs the classes' names"),
        ("tracking.uri=http://127.0.0.1:9", "no MLflow server answers at http://127.0.0.1:9"),
    ],
)
def test_a_wrong_setting(train, tmp_path, override, said):
    assert said in train("train.yaml", override)
    assert not (tmp_path / "runs").exists(), "nothing is begun"


def test_a_config_that_cannot_be_read(train, tmp_path):
    assert train("trian.yaml").startswith("no config at 'trian.yaml'")
    (tmp_path / "list.yaml").write_text("- 1")
    assert train("list.yaml") == "'list.yaml' must hold keys and values, not list"
    (tmp_path / "half.yaml").write_text("name: {")
    assert train("half.yaml").startswith("'half.yaml' is not YAML: ")
    assert train("train.yaml", "--json") == "--json needs a value"


def test_a_data_set_that_is_not_as_its_manifest_says(train, tmp_path, values):
    folder = tmp_path / "data"
    with (folder / "000001.tar").open("ab") as shard:
        shard.write(b"more")
    said = train("train.yaml")
    assert "000001.tar' has" in said
    assert "rayclip index" in said
    (folder / "000001.tar").unlink()
    assert "names shard '000001.tar', which is not there" in train("train.yaml")
    Manifest.from_spans(folder, []).save()
    assert "is empty: its manifest lists no samples" in train("train.yaml")
    (folder / "manifest.parquet").write_bytes(b"half a manifest")
    assert "is not a rayclip manifest" in train("train.yaml")
    (folder / "manifest.parquet").unlink()
    assert "no 'manifest.parquet' in" in train("train.yaml")


def test_a_name_that_a_run_with_other_settings_has(train, tmp_path, values):
    begun = resolve(TrainConfig.model_validate(values)).model_dump(mode="json")
    RunFolder(tmp_path / "runs/run").write_record(begun, "0123")
    said = train("train.yaml", "optimizer.lr=0.1")
    assert "holds a run with optimizer.lr = 0.0005, not 0.1: give this one another name" in said
    assert "holds a run with seed = 0, not 1" in train("train.yaml", "seed=1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian.yaml"], "no config at 'trian.yaml'"),
        (["train.yaml", "data.path=elsewhere"], "elsewhere': the folder does not exist"),
        (
            ["train.yaml", "cluster.num_workers=2", "cluster.use_gpu=true"],
            "a run with 2 workers and a reader needs 3 CPU, 2 GPU; the cluster has ",
        ),
    ],
    ids=["config", "data", "gpus"],
)
def test_as_a_process(tmp_path, values, arguments, said):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/platform", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.train", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180)
    # What a cluster has is known once there is one, and waiting for it is said.
    lines = [line for line in done.stderr.splitlines() if line != "starting Ray ..."]
    assert said in only_error(done.returncode, "\n".join(lines))
    assert done.stdout == ""
