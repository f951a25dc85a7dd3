"""Suites without Ray: entries, layouts, what is said of bad ones, and the figures against naive counts."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from rayclip.cli import evaluate
from rayclip.config import DataSetConfig, SuiteConfig
from rayclip.config.loader import load
from rayclip.data.formats.tar import read_samples
from rayclip.errors import UserError
from rayclip.evaluation import scoring
from rayclip.evaluation.features import LabelledFeatures
from rayclip.evaluation.layout import open_split
from rayclip.evaluation.suite import entries, open_suite, resolve

PAPER = [
    "imagenet",
    "birdsnap",
    "cifar10",
    "cifar100",
    "clevr_counts",
    "caltech101",
    "country211",
    "dtd",
    "eurosat",
    "fgvc_aircraft",
    "fer2013",
    "flowers102",
    "food101",
    "gtsrb",
    "hateful_memes",
    "kitti_distance",
    "kinetics700",
    "mnist",
    "oxford_pets",
    "voc2007",
    "patch_camelyon",
    "resisc45",
    "sst2_rendered",
    "stl10",
    "sun397",
    "stanford_cars",
    "ucf101",
]
SHIFTS = ["imagenet_v2", "imagenet_r", "imagenet_a", "imagenet_sketch", "objectnet"]


def config(root, datasets, **changes):
    values = {"name": "s", "model": "m", "root": str(root), "cache": str(root / "cache"), "datasets": datasets}
    return SuiteConfig.model_validate({**values, **changes})


@pytest.fixture
def shards(tmp_path, write_dataset, make_samples):
    """A data set in shards, without a manifest, with three classes."""
    write_dataset(tmp_path / "mine" / "test", make_samples(30))
    (tmp_path / "mine" / "test" / "manifest.parquet").unlink()
    (tmp_path / "mine" / "classnames.txt").write_text("a\nb\nc\n")
    return tmp_path / "mine"


# Entries


def test_every_data_set_of_the_paper_has_an_entry():
    assert {*PAPER, *SHIFTS, "mscoco_captions", "flickr30k"} <= set(entries())
    assert len(PAPER) == 27
    suite = load(SuiteConfig, "platform/rayclip/recipes/suite_paper.yaml", ["model=m"])
    assert set(suite.datasets) == {*PAPER, *SHIFTS, "mscoco_captions", "flickr30k"}


@pytest.mark.parametrize("name", entries())
def test_an_entry_holds_settings(name):
    assert resolve(name, DataSetConfig()).title


def test_metrics_are_those_of_the_paper():
    metrics = {name: resolve(name, DataSetConfig()).main_metric for name in PAPER}
    by_class = {"fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"}
    others = {"voc2007": "eleven_point_map", "hateful_memes": "roc_auc", "kinetics700": "mean_top1_top5"}
    for name, metric in metrics.items():
        assert metric == others.get(name, "mean_per_class" if name in by_class else "top1")


def test_what_is_given_comes_before_the_entry(shards):
    chosen = resolve("oxford_pets", DataSetConfig(path=str(shards), metric="top1"))
    assert (chosen.metric, chosen.num_classes, chosen.split) == ("top1", 37, "test")


# Layouts


def test_shards_are_indexed_in_the_cache_and_nothing_is_written_beside_them(shards, tmp_path, make_samples):
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    (found,) = open_suite(config(tmp_path, {"mine": {}})).datasets
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before
    manifest = found.manifest
    read = [sample for chunk in range(len(manifest)) for sample in read_samples(manifest.read_chunk(chunk))]
    assert [sample["png"] for sample in read] == [sample["png"] for sample in make_samples(30)]
    assert found.class_names == ("a", "b", "c")


def test_folders_of_classes_are_read_in_the_order_of_their_names(tmp_path):
    for name, colour, count in (("cat", "red", 3), ("ant", "blue", 2)):
        for index in range(count):
            path = tmp_path / "mine" / "test" / name / f"p.{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), colour).save(path)
    (found,) = open_suite(config(tmp_path, {"mine": {}})).datasets
    assert found.class_names == ("ant", "cat")
    samples = read_samples(found.manifest.read_chunk(0))
    assert [int(sample["cls"]) for sample in samples] == [0, 0, 1, 1, 1]
    assert samples[4]["jpeg"] == (tmp_path / "mine/test/cat/p.2.JPEG").read_bytes()


def test_templates_come_from_the_suite_then_the_data_then_the_entry(shards, tmp_path):
    def templates(**given):
        return open_suite(config(tmp_path, {"mine": given})).datasets[0].templates

    assert templates() == ("a photo of a {}.",)
    (shards / "zeroshot_classification_templates.txt").write_text("one {c}\ntwo {c}!\n\n")
    assert templates() == ("one {}", "two {}!")
    assert templates(templates=["a {}"]) == ("a {}",)


def test_a_changed_shard_is_other_data(shards, tmp_path):
    first = open_split(shards / "test", tmp_path / "cache")
    shard = sorted((shards / "test").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[-2000] ^= 1
    shard.write_bytes(content)
    assert open_split(shards / "test", tmp_path / "cache").folder != first.folder


# Errors


def broken(shards, what):
    if what == "split":
        (shards / "test").rename(shards / "val")
    elif what == "names":
        (shards / "classnames.txt").unlink()
    elif what == "name":
        (shards / "classnames.txt").write_text("a\n\nc\n")
    elif what == "template":
        (shards / "zeroshot_classification_templates.txt").write_text("a {c}\na photo\n")
    elif what == "templates":
        (shards / "zeroshot_classification_templates.txt").write_text("\n")
    elif what == "shard":
        (shards / "test" / "nshards.txt").write_text("9\n")
    elif what == "nothing":
        for shard in (shards / "test").glob("*.tar"):
            shard.unlink()


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("split", r"'.*mine' has no split 'test': allowed: val"),
        ("names", r"no 'classnames\.txt' in '.*mine' or '.*test': zero-shot needs the classes' names, a line each"),
        ("name", r"'.*mine': class 1 has no name in classnames\.txt"),
        ("template", r"'.*mine': .*templates\.txt, line 2: 'a photo' has no \{c\} where the class name goes"),
        ("templates", r"'.*mine': .*templates\.txt is empty: it needs a template a line, or it must not be there"),
        ("shard", r"'.*test': nshards\.txt says 9 shards, 3 are there"),
        ("nothing", r"'.*test' has neither tar shards \(\*\.tar\) nor a folder a class with pictures"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(shards, tmp_path, what, line):
    broken(shards, what)
    with pytest.raises(UserError, match=rf"^data set 'mine': {line}"):
        open_suite(config(tmp_path, {"mine": {}}))


def test_class_folders_must_be_those_of_the_list(tmp_path):
    for name in ("ant", "bee", "cat"):
        (tmp_path / "mine" / "test" / name).mkdir(parents=True)
    (tmp_path / "mine" / "classnames.txt").write_text("ant\nbee\n")
    line = r"^data set 'mine': '.*': classnames\.txt names 2 classes, '.*test' has 3 folders"
    with pytest.raises(UserError, match=line):
        open_suite(config(tmp_path, {"mine": {"class_names": None}}))
    (tmp_path / "mine" / "classnames.txt").unlink()
    with pytest.raises(UserError, match=r"^data set 'mine': class folder '.*ant' has no pictures: remove it, or"):
        open_suite(config(tmp_path, {"mine": {}}))


def test_what_is_not_there_is_listed_or_stops_the_job(shards, tmp_path):
    datasets = {"mine": {}, "cifar10": {}, "cifar1": {}}
    found = open_suite(config(tmp_path, datasets, require="any"))
    assert [dataset.name for dataset in found.datasets] == ["mine"]
    assert set(found.not_there) == {"cifar10", "cifar1"}
    assert "wds_vtab-cifar10" in found.not_there["cifar10"]
    assert "did you mean 'cifar1" in found.not_there["cifar1"]
    with pytest.raises(UserError, match=r"^data set 'cifar10' is not there, nor are 1 others: .*; require=any goes on"):
        open_suite(config(tmp_path, datasets))
    with pytest.raises(UserError, match=r"^data set 'cifar10' is not there: no folder"):
        open_suite(config(tmp_path, {"cifar10": {}}, require="any"))


def test_retrieval_alone_needs_nothing_else(shards, tmp_path):
    (dataset,) = open_suite(config(tmp_path, {"mine": {"tasks": ["retrieval"]}})).datasets
    assert dataset.config.main_metric == "text_to_image.recall_at_1"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"metric": "roc_auc"}, "its tasks give no roc_auc: they give mean_per_class, mean_top1_top5, top1"),
        ({"tasks": ["few_shot"], "train_split": "test"}, "its tasks give no top1: add zero_shot, linear_probe or"),
        ({"tasks": ["zero_shot", "linear_probe"]}, "has no split .train.: allowed: test"),
        ({"tasks": ["retrieval", "corruptions"], "labels": "multi"}, "task corruptions needs one label a picture"),
        ({"metric": "text_to_image.recall_at_1"}, "its tasks give no text_to_image.recall_at_1"),
    ],
)
def test_what_no_task_could_give_is_refused_before_the_run_and_by_its_check(shards, tmp_path, given, line):
    with pytest.raises(UserError, match=line):
        open_suite(config(tmp_path, {"mine": given}))
    with pytest.raises(UserError, match=line):
        evaluate.command.check(config(tmp_path, {"mine": given}))


def test_names_of_metrics_of_the_last_release_are_taken_with_a_line(shards, tmp_path, capsys):
    (dataset,) = open_suite(config(tmp_path, {"mine": {"metric": "accuracy"}})).datasets
    assert dataset.config.main_metric == "top1"
    assert "note: metric accuracy is called top1 now" in capsys.readouterr().err


def test_a_command_that_takes_a_model_and_a_config_asks_for_both():
    with pytest.raises(UserError, match=r"^give CONFIG; --help shows every key$"):
        evaluate.command(["model"])


# Figures


@pytest.fixture(scope="module")
def answered():
    """Answers of two templates among seven classes, read in two parts, with the scores they were made from."""
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(100, 8), dim=1)
    prompts = torch.nn.functional.normalize(torch.randn(14, 8), dim=1)
    labels = torch.randint(7, (100,))
    ids = [f"{i}" for i in range(100)]
    one = torch.ones(100, dtype=torch.int64)
    cuts = (slice(0, 60), slice(60, 100))
    parts = [LabelledFeatures(ids[cut], features[cut], labels[cut], one[cut]) for cut in cuts]
    rows = [list(range(7)), list(range(7, 14))]
    return features, prompts, labels, scoring.answer(parts, prompts, rows, 10.0, keep_scores=True)


def test_answers_are_those_of_the_whole_matrix(answered):
    features, prompts, labels, answers = answered
    classes = torch.nn.functional.normalize((prompts[:7] + prompts[7:]) / 2, dim=1)
    scores = features @ classes.T
    assert torch.equal(answers.answer_N, scores.argmax(dim=1))
    torch.testing.assert_close(answers.confidence_N, (10 * scores).softmax(dim=1).max(dim=1).values)
    for template in (0, 1):
        alone = (features @ prompts[7 * template : 7 * template + 7].T).argmax(dim=1) == labels
        assert torch.equal(answers.template_correct_TN[template], alone)


def test_figures_are_what_scikit_learn_gives(answered):
    _, _, labels, answers = answered
    found = scoring.figures(answers, 7)
    order = answers.scores_NC.argsort(dim=1, descending=True)
    assert found["top1"].value == pytest.approx((order[:, 0] == labels).double().mean().item())
    assert found["top5"].value == pytest.approx((order[:, :5] == labels[:, None]).any(dim=1).double().mean().item())
    assert found["mean_per_class"].value == pytest.approx(balanced_accuracy_score(labels, answers.answer_N))
    assert found["mean_top1_top5"].value == pytest.approx((found["top1"].value + found["top5"].value) / 2)
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())


def test_the_gain_of_the_ensemble_is_paired(answered):
    answers = answered[3]
    report = scoring.template_report(answers, ("{}", "a {}"))
    ensemble = answers.correct.double().numpy()
    alone = answers.template_correct_TN.double().numpy()
    assert report["gain_over_mean"]["value"] == pytest.approx((ensemble - alone.mean(axis=0)).mean())
    generator = np.random.default_rng(0)
    difference = ensemble - alone[0]
    means = difference[generator.integers(100, size=(4000, 100))].mean(axis=1)
    bootstrap = np.quantile(means, [0.025, 0.975])
    assert [report["gain_over_first"][key] for key in ("low", "high")] == pytest.approx(bootstrap, abs=0.02)


def test_intervals_of_the_mean_per_class_cover():
    """Of 300 data sets drawn from known class accuracies about 95% hold the mean of these in their interval."""
    generator = np.random.default_rng(1)
    truth = np.array([0.1, 0.5, 0.7, 0.9, 0.3])
    counts = np.array([6, 10, 40, 12, 25])
    label = torch.tensor(np.repeat(np.arange(5), counts))
    covered = 0
    for _ in range(300):
        wrong = torch.tensor(generator.random(len(label)) >= truth[label.numpy()])
        nothing = torch.zeros(len(label))
        answers = scoring.Answers([], label, label, wrong.long(), nothing, wrong[None], None)
        found = scoring.figures(answers, 5)["mean_per_class"]
        covered += found.low <= truth.mean() <= found.high
    assert 0.90 <= covered / 300 <= 0.99


def test_an_empty_class_is_named(answered):
    names = tuple("abcdefghij")
    line = r"^class 7 'h' has no picture, and 2 others have none: the class list is of other data, or set"
    with pytest.raises(UserError, match=line):
        scoring.check_classes(answered[3], names)
