"""Embedding and labelling data sets: against the encoder run directly, with bad samples, killed and started again."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rayclip.cli import classify as classify_job
from rayclip.cli import embed as embed_job
from rayclip.cli.command import run_and_exit
from rayclip.config import ClassifyConfig, EmbedConfig, WorkersConfig
from rayclip.data.decode import eval_array, read_image
from rayclip.data.formats.tar import read_samples
from rayclip.data.tokenizer import get_tokenizer
from rayclip.errors import UserError
from rayclip.inference.encoder import Encoder
from rayclip.inference.zero_shot import class_matrix, zero_shot_probabilities
from rayclip.models.clip import CLIP
from rayclip.orchestration.batch import task_runner as pool
from rayclip.orchestration.batch.embed import Embedder, open_model, reading_of
from rayclip.orchestration.batch.output_jobs import run_parts
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, plan_parts
from rayclip.training.checkpoint import load_model

ROOT = Path(__file__).resolve().parents[2]
NUM_SAMPLES = 100
LABELS = ["a red square", "a blue circle", "noise", "a cat"]
TEMPLATES = ("{}", "a picture of {}")
# What is wrong with a sample, by its number: where more than the picture is, the picture comes first.
WRONG = {7: "image_undecodable", 30: "no_image", 31: "image_undecodable, no_caption", 44: "no_caption"}
UNREADABLE = range(60, 65)
"""The samples of one chunk."""


def write_model(folder, config, seed):
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    save_file(CLIP(config).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"name": "tiny", "model": config.model_dump(mode="json")}))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_config):
    return write_model(tmp_path_factory.mktemp("model") / "samples-1", tiny_config, seed=0)


@pytest.fixture(scope="module")
def encoder(checkpoint, tiny_config):
    return Encoder(load_model(checkpoint), get_tokenizer(tiny_config.text.context_length), "cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_samples, write_dataset):
    """A data set with one of every trouble in it, in chunks of 5."""
    samples = make_samples(NUM_SAMPLES)
    for number, causes in WRONG.items():
        if "image_undecodable" in causes:
            samples[number]["png"] = samples[number]["png"][:80]
        if "no_image" in causes:
            del samples[number]["png"]
        if "no_caption" in causes:
            del samples[number]["txt"]
    folder = tmp_path_factory.mktemp("data") / "set"
    manifest = write_dataset(folder, samples, shard_samples=20)
    chunk = UNREADABLE[0] // 5
    with (folder / manifest.shards[manifest.shard[chunk]]).open("r+b") as shard:
        shard.seek(int(manifest.offset[chunk]))
        shard.write(b"\xff" * 600)
    return manifest


@pytest.fixture(scope="module")
def expected(data, encoder, tiny_config):
    """{number: (id, picture's feature or None, caption or None, its feature or None)}, all in one batch a tower."""
    ids, images, captions = {}, {}, {}
    for chunk in range(len(data)):
        if chunk * 5 == UNREADABLE[0]:
            continue
        for row, sample in enumerate(read_samples(data.read_chunk(chunk))):
            number = chunk * 5 + row
            ids[number] = f"{data.shards[data.shard[chunk]]}/{sample['__key__'].decode()}"
            if "image" not in WRONG.get(number, ""):
                images[number] = eval_array(read_image(sample), tiny_config.vision.image_size)
            if "caption" not in WRONG.get(number, ""):
                captions[number] = sample["txt"].decode()
    image_features = encoder.encode_images(np.stack(list(images.values())), len(images)).numpy()
    text_features = encoder.encode_texts(list(captions.values()), len(captions)).numpy()
    image_of, text_of = (dict(zip(a, b, strict=True)) for a, b in ((images, image_features), (captions, text_features)))
    return {n: (ids.get(n), image_of.get(n), captions.get(n), text_of.get(n)) for n in range(NUM_SAMPLES)}


def embed_config(checkpoint, data, output, **changes):
    values = {"batch_size": 8, "part_samples": 15, "max_bad_fraction": 0.2, "cluster": WorkersConfig(num_workers=2)}
    return EmbedConfig(model=str(checkpoint), data=data.folder, output=str(output), **{**values, **changes})


def read_parts(folder):
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("part-*.parquet")))


def mtimes(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("part-*.parquet")}


@pytest.fixture(scope="module")
def embedded(checkpoint, data, tmp_path_factory):
    """(config, summary) of a run through the job."""
    config = embed_config(checkpoint, data, tmp_path_factory.mktemp("embedded") / "out")
    return config, embed_job.main(config)


def assert_feature(got, wanted):
    assert (got is None) == (wanted is None)
    if wanted is not None:
        np.testing.assert_allclose(got, wanted, atol=1e-5)


# Embedding


def test_every_sample_has_a_row_with_its_embeddings_or_its_error(embedded, expected, data):
    rows = read_parts(embedded[0].output).to_pylist()
    assert len(rows) == NUM_SAMPLES
    assert len({row["id"] for row in rows}) == NUM_SAMPLES
    for number, row in enumerate(rows):
        assert (row["chunk"], row["row"]) == (number // 5, number % 5)
        assert row["shard"] == data.shards[number // 20]
        name, image_feature, caption, text_feature = expected[number]
        if number in UNREADABLE:
            assert row["error"] == "chunk_unreadable"
            assert row["key"] is None and row["caption"] is None
        else:
            assert row["error"] == WRONG.get(number)
            assert row["id"] == name == f"{row['shard']}/{row['key']}"
            assert row["caption"] == caption
        assert_feature(row["image_embedding"], image_feature)
        assert_feature(row["text_embedding"], text_feature)


def test_the_summary_and_the_parts_say_what_made_them(embedded, checkpoint, data, encoder, tiny_config):
    config, summary = embedded
    assert summary == json.loads((Path(config.output) / "summary.json").read_text())
    assert (summary["samples"], summary["bad"], summary["parts"]) == (NUM_SAMPLES, 9, 7)
    assert (summary["pictures"], summary["texts"]) == (92, 93)
    assert summary["causes"] == {"chunk_unreadable": 5, "image_undecodable": 2, "no_caption": 2, "no_image": 1}
    version = open_model(str(checkpoint), None).source.version
    assert summary["model_version"] == version
    for part, path in enumerate(sorted(Path(config.output).glob("part-*"))):
        meta = json.loads(pq.read_schema(path).metadata[b"rayclip"])
        assert (meta["part"], meta["model_version"], meta["source_digest"]) == (part, version, data.digest)
        assert meta["embed_dim"] == tiny_config.embed_dim
        assert meta["logit_scale"] == pytest.approx(encoder.logit_scale, abs=1e-6)
        assert "shorter side to 16" in meta["preprocess"]


def test_a_finished_output_is_only_reported(embedded, monkeypatch, capsys):
    config, summary = embedded
    before = mtimes(config.output)
    monkeypatch.setattr(pool, "connect", lambda **_: pytest.fail("Ray was started"))
    assert embed_job.main(config) == summary
    assert mtimes(config.output) == before
    assert "is complete already" in capsys.readouterr().err


def test_parts_that_are_gone_are_written_again_and_no_others(embedded):
    config, summary = embedded
    before, rows = mtimes(config.output), read_parts(config.output).to_pylist()
    (Path(config.output) / "part-000002.parquet").unlink()
    damaged = Path(config.output) / "part-000004.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (Path(config.output) / "summary.json").unlink()
    again = embed_job.main(config)
    assert again["new_samples"] == 30
    assert {k: again[k] for k in ("samples", "bad", "causes")} == {k: summary[k] for k in ("samples", "bad", "causes")}
    after = mtimes(config.output)
    assert {name for name in after if after[name] != before[name]} == {"part-000002.parquet", "part-000004.parquet"}
    for a, b in zip(read_parts(config.output).to_pylist(), rows, strict=True):
        assert {k: v for k, v in a.items() if "embedding" not in k} == {
            k: v for k, v in b.items() if "embedding" not in k
        }
        assert_feature(a["image_embedding"], b["image_embedding"])


def test_an_output_by_another_model_or_of_other_data_is_said(
    embedded, tiny_config, make_samples, write_dataset, tmp_path, monkeypatch
):
    config, _ = embedded
    monkeypatch.setattr(pool, "connect", lambda **_: pytest.fail("Ray was started"))
    other = write_model(tmp_path / "samples-1", tiny_config, seed=1)
    with pytest.raises(UserError, match=r"is by model samples-1@\w{8}, this run is by samples-1@\w{8}"):
        embed_job.main(config.model_copy(update={"model": str(other)}))
    write_dataset(tmp_path / "data", make_samples(30, seed=1))
    with pytest.raises(UserError, match="this is another data set"):
        embed_job.main(config.model_copy(update={"data": str(tmp_path / "data")}))
    with pytest.raises(UserError, match="has both, not texts"):
        embed_job.main(config.model_copy(update={"what": "texts"}))


def test_too_many_errors_end_the_job_and_more_patience_ends_it_well(checkpoint, data, tmp_path):
    config = embed_config(checkpoint, data, tmp_path / "out", max_bad_fraction=0.01)
    with pytest.raises(UserError, match=r"9 of 100 samples cannot be used \(5 chunk_unreadable, ") as caught:
        embed_job.main(config)
    assert "\n" not in str(caught.value)
    before = mtimes(config.output)
    assert len(before) == 7
    summary = embed_job.main(config.model_copy(update={"max_bad_fraction": 0.1}))
    assert summary["new_samples"] == 0
    assert mtimes(config.output) == before


@pytest.mark.parametrize("what", ["pictures", "texts"])
def test_one_side_alone(checkpoint, data, expected, what):
    config = embed_config(checkpoint, data, "unused", what=what, batch_size=3)
    model = open_model(str(checkpoint), None)
    work = Embedder(model, reading_of(config, data.folder, data.digest, what))
    parts = [work(part) for part in range(len(plan_parts(data, config.part_samples)))]
    asked, other = ("image", "text") if what == "pictures" else ("text", "image")
    for number, row in enumerate(row for part in parts for row in part.table.to_pylist()):
        _, image_feature, caption, text_feature = expected[number]
        assert_feature(row[f"{asked}_embedding"], image_feature if what == "pictures" else text_feature)
        assert row[f"{other}_embedding"] is None
        assert row["caption"] == caption
        causes = [c for c in WRONG.get(number, "").split(", ") if ("caption" in c) == (what == "texts") and c]
        assert row["error"] == ("chunk_unreadable" if number in UNREADABLE else ", ".join(causes) or None)
    assert sum(part.tally["rows"]["bad"] for part in parts) == 5 + sum(
        any(("caption" in c) == (what == "texts") for c in causes.split(", ")) for causes in WRONG.values()
    )


def test_captions_that_repeat_are_encoded_once(checkpoint, make_samples, write_dataset, tmp_path, monkeypatch):
    samples = make_samples(20)
    for i, sample in enumerate(samples):
        sample["txt"] = f"caption {i % 3}".encode()
    manifest = write_dataset(tmp_path, samples)
    work = Embedder(
        open_model(str(checkpoint), None),
        reading_of(embed_config(checkpoint, manifest, "unused"), manifest.folder, manifest.digest, "both"),
    )
    encoded = []
    encode = work.encoder.encode_texts
    monkeypatch.setattr(work.encoder, "encode_texts", lambda texts, size: encoded.append(texts) or encode(texts, size))
    table = work(0).table
    assert encoded == [["caption 0", "caption 1", "caption 2"]]
    wanted = encode([f"caption {i % 3}" for i in range(len(table))]).numpy()
    np.testing.assert_allclose(np.stack(table["text_embedding"].to_pylist()), wanted, atol=1e-5)


def test_a_data_set_that_changes_meanwhile_is_said(checkpoint, data):
    config = embed_config(checkpoint, data, "unused")
    with pytest.raises(UserError, match="has changed since the run began"):
        Embedder(open_model(str(checkpoint), None), reading_of(config, data.folder, "0123", "both"))


# Workers


def test_what_a_worker_finds_wrong_is_one_line_here(tmp_path, capfd):
    identity = {"kind": "embed", "model_version": "x", "source": "y"}
    folder = PartitionedOutput(tmp_path / "out", identity, 4)
    folder.begin()

    def make():
        def work(part):
            if part == 2:
                raise UserError("part 2 is no good")
            return Part(pa.table({"id": ["a"]}), {"rows": {"samples": 1, "bad": 0}})

        return work

    with pytest.raises(UserError) as caught:
        run_parts(folder, make, WorkersConfig(), 4, 0.0)
    assert str(caught.value) == "part 2 is no good"
    assert "constructor arguments in the object store" not in capfd.readouterr().err
    assert not (folder.path / "summary.json").exists()


@pytest.mark.chaos
def test_a_part_that_kills_every_worker_ends_the_job(tmp_path):
    folder = PartitionedOutput(tmp_path / "out", {"kind": "embed", "model_version": "x", "source": "y"}, 2)
    folder.begin()

    def make():
        def work(part):
            if part == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return Part(pa.table({"id": ["a"]}), {"rows": {"samples": 1, "bad": 0}})

        return work

    with pytest.raises(UserError, match="3 workers in a row were lost with part 1, most likely for lack of memory"):
        run_parts(folder, make, WorkersConfig(), 2, 0.0)


def processes(parent, title):
    """Those among a process' descendants whose title begins with this."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.chaos
def test_killed_midway_and_started_again_has_the_same_rows(checkpoint, write_dataset, tmp_path):
    images = []
    for _ in range(4):
        file = io.BytesIO()
        Image.effect_noise((1600, 1600), 50).convert("RGB").save(file, "JPEG")
        images.append(file.getvalue())
    samples = [
        {"__key__": f"{i:06}".encode(), "jpg": images[i % 4] if i != 77 else b"no", "txt": f"noise {i}".encode()}
        for i in range(300)
    ]
    manifest = write_dataset(tmp_path / "data", samples, shard_samples=100)
    config = embed_config(checkpoint, manifest, tmp_path / "out", part_samples=5)
    (tmp_path / "config.yaml").write_text(config.model_dump_json())
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = (tmp_path / "log").open("w")
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.embed", str(tmp_path / "config.yaml")],
        cwd=ROOT, env=environment, stdout=log, stderr=log,
    )  # fmt: skip
    output = Path(config.output)

    def wait_for(num_parts):
        deadline = time.monotonic() + 180
        while len(mtimes(output)) < num_parts:
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)

    try:
        wait_for(2)
        workers = processes(psutil.Process(job.pid), "ray::_TaskWorker")
        assert workers
        workers[0].kill()  # another takes its place, or what it left is done by the others
        wait_for(len(mtimes(output)) + 4)
    finally:
        left = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGKILL)
        job.wait()
        _, alive = psutil.wait_procs(left, timeout=3)
        for process in alive:
            process.kill()
        log.close()
    before = mtimes(output)
    assert 6 <= len(before) < 60

    summary = embed_job.main(config)

    assert summary["new_samples"] == 300 - 5 * len(before)
    assert {name: mtimes(output)[name] for name in before} == before, "finished parts are not written again"
    got = read_parts(output)
    work = Embedder(open_model(str(checkpoint), None), reading_of(config, manifest.folder, manifest.digest, "both"))
    wanted = pa.concat_tables(work(part).table for part in range(60))
    assert got.drop_columns(["image_embedding", "text_embedding"]) == wanted.drop_columns(
        ["image_embedding", "text_embedding"]
    )
    assert got["error"].to_pylist() == [None] * 77 + ["image_undecodable"] + [None] * 222
    for column in ("image_embedding", "text_embedding"):
        for a, b in zip(got[column].to_pylist(), wanted[column].to_pylist(), strict=True):
            assert_feature(a, b)


# Labelling


def classify_config(checkpoint, output, **changes):
    values = {"batch_size": 8, "part_samples": 15, "max_bad_fraction": 0.2, "top_k": 3}
    return ClassifyConfig(
        model=str(checkpoint), output=str(output), labels=LABELS, templates=TEMPLATES, **{**values, **changes}
    )


@pytest.fixture(scope="module")
def labelled(checkpoint, data, tmp_path_factory):
    """(config, summary) of labels from pictures."""
    config = classify_config(checkpoint, tmp_path_factory.mktemp("labelled") / "out", data=data.folder)
    return config, classify_job.main(config)


def test_labels_are_what_zero_shot_gives(labelled, encoder, expected):
    config, summary = labelled
    classes = class_matrix(encoder, LABELS, TEMPLATES)
    rows = read_parts(config.output).to_pylist()
    assert len(rows) == len({row["id"] for row in rows}) == NUM_SAMPLES
    counts = dict.fromkeys(LABELS, 0)
    for number, row in enumerate(rows):
        name, feature, _, _ = expected[number]
        if feature is None:
            cause = "chunk_unreadable" if number in UNREADABLE else WRONG[number].split(", ")[0]
            assert (row["error"], row["label"], row["score"], row["top"]) == (cause, None, None, None)
            continue
        assert (row["id"], row["error"]) == (name, None), "a missing caption is no error here"
        scores = zero_shot_probabilities(torch.tensor(feature)[None], classes, encoder.logit_scale)[0]
        best = scores.argsort(descending=True)[:3]
        np.testing.assert_allclose([entry["score"] for entry in row["top"]], scores[best], atol=1e-5)
        assert [entry["label"] for entry in row["top"]] == [LABELS[i] for i in best]
        assert (row["label"], row["score"]) == (row["top"][0]["label"], row["top"][0]["score"])
        counts[row["label"]] += 1
    assert summary["labels"] == {label: count for label, count in counts.items() if count}
    assert summary["causes"] == {"chunk_unreadable": 5, "image_undecodable": 2, "no_image": 1}
    assert (summary["samples"], summary["bad"]) == (NUM_SAMPLES, 8)


def test_labels_from_embeddings_are_those_from_the_pictures(labelled, embedded, checkpoint, tmp_path, monkeypatch):
    config = classify_config(checkpoint, tmp_path / "out", embeddings=embedded[0].output)
    summary = classify_job.main(config)
    assert summary["parts"] == labelled[1]["parts"]
    got, wanted = read_parts(config.output), read_parts(labelled[0].output)
    assert got.select(["id", "label", "error"]) == wanted.select(["id", "label", "error"])
    for a, b in zip(got["top"].to_pylist(), wanted["top"].to_pylist(), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert [entry["label"] for entry in a] == [entry["label"] for entry in b]
            np.testing.assert_allclose([e["score"] for e in a], [e["score"] for e in b], atol=1e-5)


def test_labels_come_from_a_file_too_and_other_labels_are_said(labelled, tmp_path, monkeypatch):
    config, summary = labelled
    monkeypatch.setattr(pool, "connect", lambda **_: pytest.fail("Ray was started"))
    file = tmp_path / "classnames.txt"
    file.write_text("".join(f"{label}\n" for label in LABELS))
    assert classify_job.main(config.model_copy(update={"labels": str(file)})) == summary
    with pytest.raises(UserError, match="has other labels or templates"):
        classify_job.main(config.model_copy(update={"labels": ("a", "b", "c", "d")}))
    with pytest.raises(UserError, match="has other labels or templates"):
        classify_job.main(config.model_copy(update={"templates": "plain"}))
    with pytest.raises(UserError, match="has the best 3 labels, not 2"):
        classify_job.main(config.model_copy(update={"top_k": 2}))
    # There are no more than four.
    with pytest.raises(UserError, match="has the best 3 labels, not 4"):
        classify_job.main(config.model_copy(update={"top_k": 100}))


def test_embeddings_by_another_model_are_said(embedded, tiny_config, tmp_path):
    other = write_model(tmp_path / "samples-2", tiny_config, seed=1)
    config = classify_config(other, tmp_path / "out", embeddings=embedded[0].output)
    with pytest.raises(UserError, match=r"are by model samples-1@\w{8}, and '.*' is samples-2@\w{8}, another model"):
        classify_job.main(config)
    assert not (tmp_path / "out").exists()


# Bad input


@pytest.fixture
def run(checkpoint, data, tmp_path, monkeypatch, capsys):
    """Runs a job's command line in this process; gives the line that follows `error: `."""
    common = {"model": str(checkpoint), "data": data.folder, "output": str(tmp_path / "out")}
    (tmp_path / "embed.yaml").write_text(json.dumps(common))
    (tmp_path / "classify.yaml").write_text(json.dumps({**common, "labels": LABELS}))
    jobs = {"embed": embed_job.command, "classify": classify_job.command}
    monkeypatch.setattr(pool, "connect", lambda **_: pytest.fail("Ray was started"))

    def call(name, *overrides):
        monkeypatch.setattr(sys, "argv", ["rayclip", str(tmp_path / f"{name}.yaml"), *overrides])
        with pytest.raises(SystemExit) as caught:
            run_and_exit(jobs[name])
        output = capsys.readouterr()
        assert caught.value.code == 2, output.err
        assert output.out == ""
        (line,) = output.err.splitlines()
        assert line.startswith("error: ")
        assert not (tmp_path / "out").exists()
        return line.removeprefix("error: ")

    return call


@pytest.mark.parametrize(
    ("job", "override", "said"),
    [
        ("embed", "model=nowhere", "no model at 'nowhere'"),
        ("embed", "model=models:/letters", "names no model: a model is models:/NAME@ALIAS"),
        ("embed", "data=nowhere", "nowhere': the folder does not exist"),
        ("embed", "what=sounds", "'what' is 'sounds'"),
        ("embed", "batch_size=0", "'batch_size' is 0"),
        ("embed", "cluster.num_worker=2", "unknown key 'cluster.num_worker': did you mean 'num_workers'?"),
        ("classify", "labels=nowhere.txt", "labels cannot be read from 'nowhere.txt': No such file"),
        ("classify", "labels=[]", "the list of classes is empty"),
        ("classify", "labels=[a, '']", "class 1 of 2 has an empty name"),
        ("classify", "templates=[a photo]", "template 0 'a photo' has no {}"),
        ("classify", "embeddings=somewhere", "give exactly one of data and embeddings"),
        ("classify", "data=null", "give exactly one of data and embeddings"),
    ],
)
def test_bad_input_is_one_line(run, job, override, said):
    assert said in run(job, override)


def test_no_embeddings_to_classify(run, tmp_path):
    assert "holds nothing of rayclip embed" in run("classify", "data=null", f"embeddings={tmp_path}")


def test_a_damaged_model_is_one_line(run, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    assert "is damaged: model.safetensors cannot be read" in run("embed", f"model={broken}")


def test_a_shard_that_was_cut_is_one_line(run, make_samples, write_dataset, tmp_path):
    manifest = write_dataset(tmp_path / "data", make_samples(10))
    shard = tmp_path / "data" / manifest.shards[0]
    shard.write_bytes(shard.read_bytes()[:1000])
    assert "index it again" in run("embed", f"data={tmp_path / 'data'}")
    assert "index it again" in run("classify", f"data={tmp_path / 'data'}")


def test_a_check_refuses_what_the_job_would(checkpoint, data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    label = ClassifyConfig(model=str(checkpoint), data=data.folder, labels=LABELS, output=str(tmp_path))
    for job, config in ((embed_job, embed_config(checkpoint, data, tmp_path)), (classify_job, label)):
        with pytest.raises(UserError, match="is not empty and holds nothing of rayclip"):
            job.command.check(config)
        assert job.command.check(config.model_copy(update={"output": str(tmp_path / "new")})) is None
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
