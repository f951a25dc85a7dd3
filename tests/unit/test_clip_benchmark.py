"""Suites against CLIP_benchmark, on the same weights and data in its own layout; and what is said of bad data."""

import inspect
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rayclip.config import IngestConfig, SuiteConfig
from rayclip.data.sources import SOURCES
from rayclip.errors import UserError
from rayclip.evaluation.suite import open_suite
from rayclip.evaluation.suite_tasks import Measured, measure
from rayclip.inference.zero_shot import class_prompts
from rayclip.models.weights import read_weights, write_weights
from rayclip.orchestration.batch.embed import open_model
from rayclip.orchestration.batch.features import images_of, prompts_of

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("one_thread")]

TEMPLATES = ["a photo of {c}.", "{c}", "a drawing of {c}"]
SIZE = 32
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
NUM_CLASSES = 30
COLOURS = ("red", "green", "blue", "black", "orange", "purple", "brown")


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_theirs(folder, samples, shard_samples=40, split="test", **texts):
    """A data set as clip_benchmark_export_wds writes it."""
    (folder / split).mkdir(parents=True)
    starts = range(0, len(samples), shard_samples)
    for number, start in enumerate(starts):
        with tarfile.open(folder / split / f"{number}.tar", "w") as tar:
            for index, sample in enumerate(samples[start : start + shard_samples], start):
                for extension, data in sample.items():
                    info = tarfile.TarInfo(f"s{index:07}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / split / "nshards.txt").write_text(str(len(starts)))
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def classified(kind, count, split):
    """Samples of one of our sources, with its class names."""
    config = IngestConfig.model_validate({"source": {"kind": kind}, "output": "-"}).source
    source = SOURCES[kind]
    found = source.splits(config, Path("-"))[split]
    items = [item for item in found.items if item.cls < NUM_CLASSES]
    records = [source.read(item, config) for item in items[:: max(1, len(items) // count)]]
    names = list(found.class_names[:NUM_CLASSES])
    assert {r.cls for r in records} == set(range(len(names)))
    return [{"png": png(r.image), "cls": str(r.cls).encode()} for r in records], names


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    generator = np.random.default_rng(0)
    for name, kind, split, count in (
        ("digits", "digits", "test", 360),
        ("letters", "glyphs", "unseen_combinations", 250),
    ):
        samples, names = classified(kind, count, split)
        write_theirs(root / name, samples, classnames=names, zeroshot_classification_templates=TEMPLATES)
    captioned, tagged = [], []
    for i in range(90):
        pixels = generator.integers(0, 256, (40 + i % 17, 50, 3), dtype=np.uint8)
        colours = generator.permutation(len(COLOURS))[: 1 + i % 3]
        for row, colour in enumerate(colours):
            pixels[10 * row : 10 * row + 10] = np.array(Image.new("RGB", (50, 10), COLOURS[colour]))
        captions = [f"{COLOURS[c]} noise number {i}, told the {n}th time" for n, c in enumerate(colours)]
        hot = np.zeros(len(COLOURS), dtype=np.int64)
        hot[colours] = 1
        image = png(Image.fromarray(pixels))
        captioned.append({"png": image, "txt": "\n".join(captions).encode()})
        tagged.append({"png": image, "npy": npy(hot)})
    write_theirs(root / "flickr30k", captioned, dataset_type=["retrieval"])
    names = {"classnames": COLOURS, "zeroshot_classification_templates": TEMPLATES, "dataset_type": ["multilabel"]}
    write_theirs(root / "voc2007", tagged, **names)
    return root


@pytest.fixture(scope="module")
def their_model(open_clip, tmp_path_factory):
    """A model of theirs with random weights, large enough to tell pictures apart, and its folder as we read it."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("in_proj_weight", "c_fc.weight", "conv1.weight", "embedding", "embedding.weight")):
                weight.mul_(8)
    folder = tmp_path_factory.mktemp("model")
    torch.save(model.state_dict(), folder / "random.pt")
    (folder / "open_clip").mkdir()
    (folder / "random.pt").rename(folder / "open_clip" / "open_clip_pytorch_model.bin")
    (folder / "open_clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    write_weights(folder / "ours", read_weights(folder / "open_clip"), "rayclip", "random")
    return model, folder / "ours"


def suite(root, model, cache, datasets):
    values = {"name": "theirs", "model": str(model), "root": str(root), "cache": str(cache), "part_samples": 64}
    return SuiteConfig.model_validate({**values, "datasets": datasets})


def extract_here(extraction):
    """In this process, as the workers of a cluster do it."""
    output = extraction.job.output
    work = extraction.job.make()
    with output.writing():
        for part in range(output.num_parts):
            output.write(part, work(part))
    return extraction.features


DATASETS = {
    "digits": {},
    "letters": {"metric": "mean_per_class"},
    "flickr30k": {},
    "voc2007": {"num_classes": 7},
}


@pytest.fixture(scope="module")
def measured(root, their_model, tmp_path_factory):
    """What we measure, by data set."""
    place = tmp_path_factory.mktemp("measured")
    config = suite(root, their_model[1], place, DATASETS)
    model = open_model(config.model, None)
    found = {}
    for dataset in open_suite(config).datasets:
        wanted = {"pictures": images_of(dataset, model, config)}
        if dataset.class_names:
            prompts, _ = class_prompts(dataset.class_names, dataset.templates)
            wanted["prompts"] = prompts_of(prompts, model, config)
        features = {name: extract_here(extraction) for name, extraction in wanted.items()}
        found[dataset.name] = measure(Measured(dataset, config, model.logit_scale, features, place / dataset.name))
    return found


@pytest.fixture(scope="module", autouse=True)
def their_accuracy():
    """Theirs but for its last step, which takes an array of one number for a number: NumPy no longer does."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    code = inspect.getsource(theirs.accuracy).replace(".cpu().numpy()", ".item()")
    exec(code, vars(theirs))


def their_figures(root, name, model, open_clip, retrieval=False):
    from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    transform = open_clip.image_transform(SIZE, is_train=False)
    task = "zeroshot_retrieval" if retrieval else "zeroshot_classification"
    dataset = build_dataset(f"wds/{name}", root=str(root / name), transform=transform, split="test", task=task)
    collate = get_dataset_collate_fn(f"wds/{name}") if not retrieval else get_dataset_collate_fn("mscoco_captions")
    loader = torch.utils.data.DataLoader(dataset.batched(32, collation_fn=collate), batch_size=None)
    if retrieval:
        return zeroshot_retrieval.evaluate(
            model, loader, open_clip.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
    loader.dataset.classes = dataset.classes
    return zeroshot_classification.evaluate(
        model, loader, open_clip.tokenize, dataset.classes, dataset.templates, "cpu", amp=False
    )


def values(measured, name, task="zero_shot"):
    return {key: figure["value"] for key, figure in measured[name][task]["figures"].items()}


@pytest.mark.parametrize("name", ["digits", "letters"])
def test_zero_shot_is_what_clip_benchmark_gives(name, root, their_model, measured, open_clip):
    theirs, ours = their_figures(root, name, their_model[0], open_clip), values(measured, name)
    assert 0 < theirs["acc1"] < theirs["acc5"] < 1, "random weights that tell nothing apart would show nothing"
    assert ours["top1"] == pytest.approx(theirs["acc1"], abs=1e-4)
    assert ours["top5"] == pytest.approx(theirs["acc5"], abs=1e-4)
    assert ours["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"], abs=1e-4)


def test_multi_label_is_what_clip_benchmark_gives(root, their_model, measured, open_clip):
    theirs = their_figures(root, "voc2007", their_model[0], open_clip)["mean_average_precision"]
    assert values(measured, "voc2007")["mean_ap"] == pytest.approx(theirs, abs=1e-4)


def test_retrieval_is_what_clip_benchmark_gives(root, their_model, measured, open_clip):
    theirs = their_figures(root, "flickr30k", their_model[0], open_clip, retrieval=True)
    ours = values(measured, "flickr30k", "retrieval")
    for k in (1, 5, 10):
        assert ours[f"image_to_text.recall_at_{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-4)
        assert ours[f"text_to_image.recall_at_{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-4)


def test_a_data_set_that_cannot_be_measured_is_one_line(root, their_model, tmp_path):
    sample = {"png": png(Image.new("RGB", (40, 40))), "cls": b"0"}
    broken = {
        "beyond": (
            [sample, {**sample, "cls": b"2"}],
            r"sample 's0000001' has class 2, but the class list names 2: 0 to 1",
        ),
        "bare": ([sample], r"sample 's0000000' has no caption \(no_caption\): retrieval needs a \.txt"),
        "torn": ([{**sample, "png": b"no"}], r"sample 's0000000' cannot be evaluated: image_undecodable"),
    }
    for name, (samples, line) in broken.items():
        write_theirs(tmp_path / name, samples, classnames=["a", "b"])
        task = {"tasks": ["retrieval"]} if name == "bare" else {}
        config = suite(tmp_path, their_model[1], tmp_path / "cache", {name: task})
        (dataset,) = open_suite(config).datasets
        work = images_of(dataset, open_model(config.model, None), config).job.make()
        with pytest.raises(UserError, match=rf"^data set '{name}': {line}"):
            work(0)
