"""Tasks of a suite from files of features, without a model: the probe beside scikit-learn's."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rayclip.config import DataSetConfig, SuiteConfig
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.evaluation.features import FeatureFolder
from rayclip.evaluation.suite import DataSet
from rayclip.evaluation.suite_tasks import TASKS, Measured, measure

NAMES = ("a", "b", "c", "d")
WIDTH, EMBED = 12, 6
CENTRES = np.random.default_rng(0).normal(size=(len(NAMES), WIDTH))


def lists(rows):
    return pa.array(rows.astype(np.float32).tolist(), pa.list_(pa.float32()))


def write_features(folder, count, seed):
    """Features of pictures in two parts; gives those before the projection, and the labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(len(NAMES), size=count)
    pooled = CENTRES[labels] + generator.normal(size=(count, WIDTH))
    embedding = pooled[:, :EMBED] / np.linalg.norm(pooled[:, :EMBED], axis=1, keepdims=True)
    folder.mkdir()
    for number, cut in enumerate((slice(0, count // 3), slice(count // 3, count))):
        ids = [f"{i}" for i in range(count)[cut]]
        columns = {"image_embedding": lists(embedding[cut]), "pooled": lists(pooled[cut])}
        table = pa.table({"id": ids, "labels": [[int(label)] for label in labels[cut]], **columns})
        pq.write_table(
            table.cast(table.schema.set(1, pa.field("labels", pa.list_(pa.int32())))),
            folder / f"part-{number:06}.parquet",
        )
    return pooled.astype(np.float32), labels


@pytest.fixture
def make(tmp_path):
    """Makes what a task is given; gives it with the features and labels by name."""

    def build(tasks, **changes):
        data = {name: write_features(tmp_path / name, count, seed) for name, count, seed in
                (("train", 240, 1), ("pictures", 150, 2), ("validation", 80, 3))}  # fmt: skip
        features = {name: FeatureFolder(tmp_path / name) for name in data}
        config = DataSetConfig.model_validate({"tasks": tasks, **changes})
        manifest = Manifest.from_spans(tmp_path, [])
        dataset = DataSet("mine", config, tmp_path, tmp_path, manifest, NAMES, ("{}",), ())
        suite = SuiteConfig(name="s", model="m", datasets={"mine": config}, shots=(1, 4), seeds=3)
        return Measured(dataset, suite, 10.0, features, tmp_path / "report"), data

    return build


def test_a_probe_is_what_scikit_learn_fits_at_its_strength(make):
    measured, data = make(["linear_probe"])
    found = measure(measured)["linear_probe"]
    assert found["num_train"] == 320
    features, labels = (np.concatenate(column) for column in zip(data["train"], data["validation"], strict=True))
    theirs = LogisticRegression(C=1 / found["strength"], max_iter=5000, tol=1e-8).fit(features, labels)
    right = theirs.score(*data["pictures"])
    assert found["figures"]["top1"]["value"] == pytest.approx(right, abs=1.5 / 150)
    assert found["figures"]["top1"]["low"] < right < found["figures"]["top1"]["high"]


def test_without_validation_a_fifth_of_training_chooses(make):
    measured, _ = make(["linear_probe", "few_shot"], metric="mean_per_class")
    features = {name: folder for name, folder in measured.features.items() if name != "validation"}
    found = measure(measured._replace(features=features))
    assert found["linear_probe"]["num_train"] == 240
    assert found["score"] == found["linear_probe"]["figures"]["mean_per_class"]
    few = found["few_shot"]["figures"]
    assert set(few) == {"shots_1", "shots_4"}
    assert few["shots_1"]["value"] < few["shots_4"]["value"] < found["score"]["value"] + 0.05


def test_zero_shot_keeps_the_answer_to_each_picture(make):
    measured, data = make(["zero_shot"])
    prompts = torch.nn.functional.normalize(torch.tensor(CENTRES[:, :EMBED], dtype=torch.float32), dim=1)
    (Path(measured.folder).parent / "prompts").mkdir()
    table = pa.table({"text_embedding": lists(prompts.numpy())})
    pq.write_table(table, Path(measured.folder).parent / "prompts" / "part-000000.parquet")
    prompt_folder = FeatureFolder(Path(measured.folder).parent / "prompts")
    found = measure(measured._replace(features={**measured.features, "prompts": prompt_folder}))
    pooled, labels = data["pictures"]
    scores = pooled[:, :EMBED] / np.linalg.norm(pooled[:, :EMBED], axis=1, keepdims=True) @ prompts.numpy().T
    answers = pq.read_table(measured.folder / "answers.parquet")
    assert answers["answer"].to_pylist() == scores.argmax(axis=1).tolist()
    assert answers["id"].to_pylist() == [str(i) for i in range(150)]
    assert found["score"]["value"] == pytest.approx((scores.argmax(axis=1) == labels).mean())
    assert found["zero_shot"]["templates"]["gain_over_first"]["value"] == 0


def test_a_metric_that_no_task_gives_is_refused(make):
    measured, _ = make(["linear_probe"], metric="text_to_image.recall_at_1")
    with pytest.raises(
        UserError, match=r"^data set 'mine': metric text_to_image.recall_at_1 is not one of a linear probe"
    ):
        measure(measured)


def test_corruptions_are_told_by_strength_and_drawn(make, tmp_path):
    measured, _ = make(["corruptions"], corruptions=["jpeg"])
    classes = np.random.default_rng(5).normal(size=(len(NAMES), EMBED)).astype(np.float32)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    (tmp_path / "prompts").mkdir()
    pq.write_table(pa.table({"text_embedding": lists(classes)}), tmp_path / "prompts" / "part-000000.parquet")
    names = ["pictures", *(f"jpeg {strength}" for strength in range(1, 6))]
    data = {name: write_features(tmp_path / name, 90, 10 + seed) for seed, name in enumerate(names[1:])}
    features = {name: FeatureFolder(tmp_path / name) for name in ("prompts", *names)}
    found = TASKS["corruptions"](measured._replace(features=features))
    right = []
    for pooled, labels in data.values():
        right.append(((pooled[:, :EMBED] @ classes.T).argmax(axis=1) == labels).astype(float))
    told = found["by_strength"]["jpeg"]
    assert [one["value"] for one in told] == pytest.approx([row.mean() for row in right])
    of_image = np.mean(right, axis=0)
    assert found["figures"]["jpeg"]["value"] == pytest.approx(of_image.mean())
    half = found["figures"]["jpeg"]["high"] - of_image.mean()
    assert half == pytest.approx(1.96 * of_image.std() / 90**0.5, rel=1e-3)
    assert found["mean_corruption_error"] == pytest.approx(1 - of_image.mean())
    assert (tmp_path / "report" / "corruptions.png").read_bytes().startswith(b"\x89PNG")
