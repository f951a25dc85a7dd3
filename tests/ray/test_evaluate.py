"""jobs.evaluate on a cluster: what is kept, what is made anew, the report, and bad data as one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rayclip.cli import compare as compare_job
from rayclip.cli import evaluate as evaluate_job
from rayclip.config import CompareConfig, SuiteConfig, WorkersConfig
from rayclip.data.decode import eval_array, read_image
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.evaluation.corruptions import corrupt
from rayclip.inference.encoder import Encoder
from rayclip.inference.zero_shot import class_matrix
from rayclip.models.clip import CLIP

NAMES = ["a red square", "a blue circle", "noise"]
NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return CLIP(tiny_config)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config, model, make_samples, write_dataset):
    """A model, and two data sets in root."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "model").mkdir()
    save_file(model.state_dict(), place / "model" / "model.safetensors")
    settings = {"name": "tiny", "model": tiny_config.model_dump(mode="json")}
    (place / "model" / "config.json").write_text(json.dumps(settings))
    for name in ("classes", "pairs", "moved"):
        write_dataset(place / "root" / name / "test", make_samples(NUM_SAMPLES))
    for name in ("classes", "moved"):
        (place / "root" / name / "classnames.txt").write_text("\n".join(NAMES))
    return place


def suite(place, **changes):
    values = {
        "name": "tiny",
        "model": str(place / "model"),
        "root": str(place / "root"),
        "datasets": {
            "classes": {"tasks": ["zero_shot", "corruptions"], "corruptions": ["gaussian_noise"]},
            "moved": {"shift_of": "classes"},
            "pairs": {"tasks": ["retrieval"]},
            "mnist": {},
        },
        "require": "any",
        "cache": str(place / "cache"),
        "output": str(place / "report"),
        "part_samples": 20,
        "cluster": WorkersConfig(num_workers=2),
    }
    return SuiteConfig.model_validate({**values, **changes})


@pytest.fixture(scope="module")
def summary(place):
    return evaluate_job.main(suite(place, experiment="suites", tracking_uri=f"sqlite:///{place / 'mlflow.db'}"))


def test_scores_are_those_of_the_encoder_alone(summary, model, make_samples):
    encoder = Encoder(model, get_tokenizer(model.context_length), "cpu")
    samples = make_samples(NUM_SAMPLES)
    images = encoder.encode_images(np.stack([eval_array(read_image(sample), 16) for sample in samples]))
    answers = (images @ class_matrix(encoder, NAMES, "photo").T).argmax(dim=1)
    right = np.mean([int(sample["cls"]) for sample in samples] == answers.numpy())
    assert summary["datasets"]["classes"]["score"]["value"] == pytest.approx(right)
    captions = encoder.encode_texts([sample["txt"].decode() for sample in samples])
    found = ((captions @ images.T).argmax(dim=1) == torch.arange(NUM_SAMPLES)).double().mean().item()
    assert summary["datasets"]["pairs"]["score"]["value"] == pytest.approx(found)
    assert "no folder" in summary["not_there"]["mnist"]


def test_corrupted_pictures_are_those_of_their_positions(summary, model, make_samples):
    encoder = Encoder(model, get_tokenizer(model.context_length), "cpu")
    samples = make_samples(NUM_SAMPLES)
    classes = class_matrix(encoder, NAMES, "photo")
    images = np.stack([eval_array(read_image(sample), 16) for sample in samples])
    noisy = [corrupt(image, "gaussian_noise", 5, position) for position, image in enumerate(images)]
    worse = encoder.encode_images(np.stack(noisy))
    right = np.mean([int(sample["cls"]) for sample in samples] == (worse @ classes.T).argmax(dim=1).numpy())
    found = summary["datasets"]["classes"]["corruptions"]
    assert found["by_strength"]["gaussian_noise"][4]["value"] == pytest.approx(right)
    mean = np.mean([one["value"] for one in found["by_strength"]["gaussian_noise"]])
    assert found["figures"]["mean_of_corrupted"]["value"] == pytest.approx(mean)
    assert found["mean_corruption_error"] == pytest.approx(1 - mean)
    # The same pictures: no shift costs nothing.
    assert summary["datasets"]["moved"]["shift"]["change"]["value"] == 0


def test_features_are_kept_and_what_is_lost_is_made_anew(summary, place):
    assert summary["extraction"]["new_samples"] == summary["extraction"]["samples"] == 8 * NUM_SAMPLES + len(NAMES)
    again = evaluate_job.main(suite(place))
    assert again["extraction"]["new_samples"] == 0
    assert again["datasets"] == summary["datasets"]
    part = sorted((place / "cache").glob("*/features-*/part-000000.parquet"))[0]
    before = part.stat().st_size
    part.unlink()
    anew = evaluate_job.main(suite(place))
    assert 0 < anew["extraction"]["new_samples"] < NUM_SAMPLES
    assert part.stat().st_size == before and anew["datasets"] == summary["datasets"]


def test_a_report_of_other_settings_is_not_replaced_in_silence(summary, place, capsys):
    evaluate_job.main(suite(place))
    assert "is replaced" not in capsys.readouterr().err
    evaluate_job.main(suite(place, seeds=suite(place).seeds + 1))
    assert "is replaced: it was of other settings (seeds is " in capsys.readouterr().err
    evaluate_job.main(suite(place))


def test_a_report_lies_in_the_folder_and_is_compared(summary, place):
    report = place / "report"
    assert json.loads((report / "summary.json").read_text())["model_version"] == summary["model_version"]
    assert json.loads((report / "classes" / "summary.json").read_text()) == summary["datasets"]["classes"]
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + len(list(report.glob("*/*.png"))) >= 4
    assert "strength 5" in page and "points beside classes" in page
    config = CompareConfig(runs=(str(report), str(report)), output=str(place / "comparison"))
    compared = compare_job.main(config)["datasets"]
    for name in ("classes", "pairs"):
        assert compared[name]["difference"][1] == {"value": 0.0, "low": 0.0, "high": 0.0, "paired": True}


def test_bad_data_ends_the_job_with_one_line(place, make_samples, write_dataset):
    write_dataset(place / "root" / "beyond" / "test", make_samples(10, num_classes=4))
    (place / "root" / "beyond" / "classnames.txt").write_text("\n".join(NAMES))
    with pytest.raises(UserError) as caught:
        evaluate_job.main(suite(place, datasets={"beyond": {}}))
    line = "data set 'beyond': sample '000003' has class 3, but the class list names 3: 0 to 2"
    assert str(caught.value) == line


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")
def test_a_cache_that_workers_do_not_share_is_refused(place, tmp_path, monkeypatch):
    """As a disk of each node's own: a path that leads elsewhere in each process."""
    monkeypatch.chdir(tmp_path)
    changes = {"cache": "/proc/self/cwd/cache", "output": str(tmp_path / "report")}
    with pytest.raises(
        UserError, match=r"is not the same folder on host '.*give a path that all nodes share, or s3://"
    ):
        evaluate_job.main(suite(place, datasets={"pairs": {"tasks": ["retrieval"]}}, **changes))
