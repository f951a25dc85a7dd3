"""Tasks on data sets on disk: what two workers or one measure, and what is wrong with a data set."""

import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from rayclip.config import ModelConfig, RetrievalTask, ZeroShotTask
from rayclip.data.decode import eval_array, read_image
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.evaluation.tasks import Evaluator, class_names
from rayclip.inference.encoder import Encoder
from rayclip.models.clip import CLIP

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["small square", "picture", "noise 7", "a fourth"]
TEMPLATES = ("{}", "a picture of {}")


def make_encoder(config):
    torch.manual_seed(0)
    return Encoder(CLIP(ModelConfig.model_validate(config)), get_tokenizer(config["text"]["context_length"]), "cpu")


def make_evaluator(folder, batch_size=7):
    tasks = {
        "classes": ZeroShotTask(path=str(folder), templates=TEMPLATES),
        "pairs": RetrievalTask(path=str(folder)),
    }
    return Evaluator(tasks, image_size=16, batch_size=batch_size)


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config.model_dump()


@pytest.fixture(scope="module")
def encoder(config):
    return make_encoder(config)


@pytest.fixture(scope="module")
def samples(make_samples):
    """Seventeen pictures of four classes; two of them share a caption."""
    samples = make_samples(17, num_classes=len(NAMES))
    samples[9]["txt"] = samples[2]["txt"]
    return samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory, samples, write_dataset):
    folder = tmp_path_factory.mktemp("tasks")
    write_dataset(folder, samples, shard_samples=9, chunk_samples=4)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    return folder


def encode(model, samples, texts):
    """Features one by one, through the model itself."""
    with torch.no_grad():
        images = torch.stack(
            [
                model.encode_image(torch.tensor(eval_array(Image.open(io.BytesIO(s["png"])), 16)[None]))[0]
                for s in samples
            ]
        )
        tokens, num_tokens = get_tokenizer(16)(texts)
        text = torch.cat(
            [
                model.encode_text(torch.from_numpy(tokens[i : i + 1]), torch.from_numpy(num_tokens[i : i + 1]))
                for i in range(len(texts))
            ]
        )
    return images.double().numpy(), text.double().numpy()


def test_zero_shot_is_what_a_naive_count_gives(encoder, folder, samples):
    images, prompts = encode(encoder.model, samples, [t.format(name) for name in NAMES for t in TEMPLATES])
    classes = prompts.reshape(len(NAMES), len(TEMPLATES), -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    best = (images @ classes.T).argsort(axis=1)[:, ::-1]
    labels = [int(sample["cls"]) for sample in samples]
    measured = make_evaluator(folder).run(encoder)["classes"]
    assert measured["top1"] == np.mean([best[i, 0] == label for i, label in enumerate(labels)])
    assert 0 < measured["top1"] < 1
    assert measured["top5"] == 1
    assert (measured["num_samples"], measured["num_classes"], measured["chance_top1"]) == (17, 4, 0.25)


def test_retrieval_is_what_a_naive_count_gives(encoder, folder, samples):
    captions = [sample["txt"].decode() for sample in samples]
    images, texts = encode(encoder.model, samples, captions)
    scores = images @ texts.T
    right = np.array([[a == b for b in captions] for a in captions])
    measured = make_evaluator(folder).run(encoder)["pairs"]
    for way, table, good in (("image_to_text", scores, right), ("text_to_image", scores.T, right.T)):
        for k in (1, 5, 10):
            hits = [sum(s >= row[ok].max() - 1e-6 for s in row[~ok]) < k for row, ok in zip(table, good, strict=True)]
            assert measured[f"{way}.recall_at_{k}"] == pytest.approx(np.mean(hits))
    assert measured["num_images"] == 17


@pytest.mark.parametrize("batch_size", [1, 100])
def test_the_batch_size_does_not_matter(encoder, folder, batch_size):
    assert make_evaluator(folder, batch_size).run(encoder) == make_evaluator(folder).run(encoder)


def test_the_model_is_left_as_it_was(encoder, folder):
    encoder.model.train()
    before = {name: p.clone() for name, p in encoder.model.state_dict().items()}
    make_evaluator(folder).run(encoder)
    assert encoder.model.training
    assert all(torch.equal(before[name], p) for name, p in encoder.model.state_dict().items())


def test_a_contact_sheet_is_written_for_zero_shot_only(encoder, folder, tmp_path):
    make_evaluator(folder).run(encoder, tmp_path / "pictures")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["classes.png"]
    assert np.asarray(Image.open(tmp_path / "pictures" / "classes.png").convert("L")).std() > 1


# Data sets that cannot be used


def broken(tmp_path, write_dataset, make_samples, changes=None, names=NAMES):
    samples = make_samples(6)
    for key, value in (changes or {}).items():
        if value is None:
            samples[4].pop(key)
        else:
            samples[4][key] = value
    write_dataset(tmp_path, samples)
    if names is not None:
        (tmp_path / "classnames.txt").write_text("\n".join(names))
    return make_evaluator(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cls": b"4"}, "sample '000004' has class 4, but classnames.txt names 4: 0 to 3"),
        ({"cls": b"-1"}, "sample '000004' has class -1"),
        ({"cls": b"three"}, "sample '000004' has no class index in a .cls file"),
        ({"cls": None}, "sample '000004' has no class index in a .cls file"),
        ({"png": b"nothing"}, "sample '000004' cannot be evaluated: image_undecodable"),
        ({"png": None}, "sample '000004' cannot be evaluated: no_image"),
        ({"txt": b" "}, "sample '000004' cannot be evaluated: caption_empty"),
        ({"txt": None}, "sample '000004' cannot be evaluated: no_caption"),
    ],
)
def test_a_sample_that_cannot_be_measured_is_named(encoder, tmp_path, write_dataset, make_samples, changes, line):
    with pytest.raises(UserError, match=line):
        broken(tmp_path, write_dataset, make_samples, changes).run(encoder)


def test_class_names_must_be_there(encoder, tmp_path, write_dataset, make_samples):
    evaluator = broken(tmp_path, write_dataset, make_samples, names=None)
    for call in (evaluator.check, lambda: evaluator.run(encoder)):
        with pytest.raises(UserError, match=f"no 'classnames.txt' in '{tmp_path}'"):
            call()
    (tmp_path / "classnames.txt").write_text("")
    with pytest.raises(UserError, match=r"task 'classes': .* names no classes"):
        evaluator.check()


def test_a_data_set_is_checked_before_it_is_needed(tmp_path, write_dataset, make_samples):
    with pytest.raises(UserError, match="the folder does not exist"):
        make_evaluator(tmp_path / "nowhere").check()
    evaluator = broken(tmp_path, write_dataset, make_samples)
    evaluator.check()
    (tmp_path / "000000.tar").unlink()
    with pytest.raises(UserError, match=r"'000000\.tar', which is not there"):
        evaluator.check()


def test_a_damaged_shard_is_named(encoder, tmp_path, write_dataset, make_samples):
    evaluator = broken(tmp_path, write_dataset, make_samples)
    shard = tmp_path / "000000.tar"
    for content in (shard.read_bytes()[:700], b"\x55" * shard.stat().st_size):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"^'{tmp_path}': shard '000000\.tar' cannot be evaluated: "):
            evaluator.run(encoder)


def test_class_names_are_lines(tmp_path):
    (tmp_path / "classnames.txt").write_text("one\ntwo words\ncafé\n", encoding="utf-8")
    assert class_names(str(tmp_path)) == ["one", "two words", "café"]


def test_class_names_may_lie_beside_the_folder_of_the_shards(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "classnames.txt").write_text("one\ntwo\n")
    assert class_names(str(tmp_path / "test")) == ["one", "two"]


def test_a_picture_may_have_several_captions_a_line_each(encoder, tmp_path, write_dataset, make_samples):
    samples = make_samples(12)
    for index, sample in enumerate(samples):
        sample["txt"] = "\n".join(f"caption {n} of {index}" for n in range(1 + index % 3)).encode()
    write_dataset(tmp_path, samples)
    evaluator = Evaluator({"captions": RetrievalTask(path=str(tmp_path))}, 16, 5)
    found = evaluator.run(encoder)["captions"]
    assert (found["num_images"], found["num_texts"]) == (12, 24)
    images = torch.cat([encoder.encode_images(eval_array(read_image(s), 16)[None]) for s in samples])
    texts = [line for sample in samples for line in sample["txt"].decode().splitlines()]
    owner = torch.arange(12).repeat_interleave(torch.tensor([1, 2, 3] * 4))
    best = (encoder.encode_texts(texts) @ images.T).argmax(dim=1)
    assert found["text_to_image.recall_at_1"] == pytest.approx((best == owner).double().mean().item())


# Two workers


def run_worker(rank, folder, data, config):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        images = f"{folder}/pictures"
        evaluator = make_evaluator(data["path"])
        results = {"all": evaluator.run(make_encoder(config), type(folder)(images) if rank == 0 else None)}
        results["errors"] = []
        for task in (ZeroShotTask(path=data["bad"]), RetrievalTask(path=data["bad"])):
            try:
                Evaluator({"bad": task}, 16, 7).run(make_encoder(config))
            except UserError as error:
                results["errors"].append(str(error))
        # One chunk: the second worker has no share.
        results["one chunk"] = make_evaluator(data["single"]).run(make_encoder(config))
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_workers_measure_what_one_does(tmp_path, encoder, config, folder, write_dataset, make_samples):
    single = tmp_path / "single"
    write_dataset(single, make_samples(4))
    (single / "classnames.txt").write_text("\n".join(NAMES))
    bad = tmp_path / "bad"
    samples = make_samples(12)
    samples[7] = samples[7] | {"cls": b"x", "txt": b""}
    write_dataset(bad, samples, chunk_samples=6)
    (bad / "classnames.txt").write_text("\n".join(NAMES))
    mp.spawn(run_worker, (tmp_path, {"path": folder, "single": single, "bad": str(bad)}, config), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        # Only the second worker met the bad sample, and both were told.
        assert got["errors"] == [
            "sample '000007' has no class index in a .cls file",
            "sample '000007' cannot be evaluated: caption_empty",
        ]
        for name, data in (("all", folder), ("one chunk", single)):
            expected = make_evaluator(data).run(encoder)
            assert got[name].keys() == expected.keys()
            for task in expected:
                assert got[name][task] == pytest.approx(expected[task])
    assert (tmp_path / "pictures" / "classes.png").is_file()


def test_tasks_measure_what_checkpoints_may_be_compared_by(encoder, folder):
    evaluator = make_evaluator(folder)
    measured = evaluator.run(encoder)
    for name, task in evaluator.tasks.items():
        assert set(task.metrics) <= measured[name].keys()
