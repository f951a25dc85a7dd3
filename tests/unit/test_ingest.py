"""Planning and writing a data set without Ray: the same bytes however often it was interrupted."""

import json

import pytest
from PIL import Image

from rayclip.config import FolderConfig, IngestConfig
from rayclip.data.formats.tar import read_samples
from rayclip.data.ingest import plan_shards, write_shard_of
from rayclip.data.manifest import Manifest
from rayclip.data.sources import SOURCES
from rayclip.errors import UserError
from rayclip.orchestration.batch.ingest import ingest
from rayclip.orchestration.batch.ingest_output import IngestOutput
from rayclip.orchestration.batch.partitioned_output import check_bad


@pytest.fixture
def config(tmp_path):
    """Twenty-five pictures, three of them bad in different ways."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(25):
        Image.new("RGB", (6, 6), (i, 0, 0)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"picture {i}")
    (folder / "03.txt").unlink()
    (folder / "11.png").write_bytes(b"broken")
    (folder / "17.txt").write_text(" ")
    return IngestConfig(
        source=FolderConfig(path=str(folder)),
        output=str(tmp_path / "out"),
        shard_samples=10,
        chunk_samples=4,
        max_bad_fraction=0.2,
    )


def begin(config):
    """(tasks, the output, begun)."""
    splits = SOURCES[config.source.kind].splits(config.source, None)
    tasks = plan_shards(config, splits)
    output = IngestOutput.unlisted(config)
    output.check()
    with output.writing():
        output = output.listed(splits, tasks)
        output.check()
        output.begin()
    return tasks, output


def write_some(config, tasks, output, numbers):
    for number in numbers:
        output.write(number, write_shard_of(config, tasks[number]))


def write(config):
    tasks, output = begin(config)
    write_some(config, tasks, output, output.missing()[0])
    tally = output.missing()[1]
    check_bad(tally, config.max_bad_fraction, output.first_bad)
    return output.finish(tally)


def is_complete(config):
    output = IngestOutput.unlisted(config)
    output.check()
    return output.read_summary() is not None


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def captions_of(folder):
    manifest = Manifest.load(folder)
    chunks = [read_samples(manifest.read_chunk(i)) for i in range(len(manifest))]
    return [sample["txt"].decode() for chunk in chunks for sample in chunk]


def test_a_data_set_holds_every_good_pair_once(config, tmp_path):
    summary = write(config)
    captions = captions_of(tmp_path / "out/train")
    assert sorted(captions) == sorted(f"picture {i}" for i in range(25) if i not in (3, 11, 17))
    assert captions != sorted(captions)
    assert summary["splits"]["train"]["samples"] == 22
    assert summary["splits"]["train"]["skipped"] == {"no_caption": 1, "image_undecodable": 1, "caption_empty": 1}
    lines = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert {(line["item"][-6:], line["cause"]) for line in lines} == {
        ("03.png", "no_caption"),
        ("11.png", "image_undecodable"),
        ("17.png", "caption_empty"),
    }
    assert not (tmp_path / "out/.ingest").exists()


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_bytes(config, tmp_path, written):
    write(config.model_copy(update={"output": str(tmp_path / "whole")}))
    tasks, output = begin(config)
    write_some(config, tasks, output, range(written))
    (tmp_path / "out/train/000001.tar.partial-dead").write_bytes(b"half")
    assert not is_complete(config)
    assert begin(config)[1].missing()[0] == [0, 1, 2][written:]
    write(config)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert is_complete(config)


def test_a_shard_without_its_record_is_written_again(config, tmp_path):
    _, output = begin(config)
    (tmp_path / "out/train/000000.tar").write_bytes(b"named, but its record was never written")
    assert output.missing()[0] == [0, 1, 2]
    write(config)
    assert len(captions_of(tmp_path / "out/train")) == 22


def test_killed_while_tidying_up(config, tmp_path):
    write(config)
    before = files_of(tmp_path / "out")
    (tmp_path / "out/.ingest").mkdir()
    assert not is_complete(config)
    write(config)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"source": FolderConfig(path="elsewhere")}, "source.path is"),
        ({"image_format": "jpg"}, "image_format is 'keep' there and 'jpg' here"),
    ],
)
def test_other_settings_are_refused(config, keys, said):
    write(config)
    with pytest.raises(UserError, match=said):
        is_complete(config.model_copy(update=keys))


def test_settings_that_change_no_bytes_are_not(config):
    write(config)
    assert is_complete(config.model_copy(update={"max_bad_fraction": 0.5}))


def test_a_source_that_changed_between_two_runs_is_refused(config, tmp_path):
    begin(config)
    Image.new("RGB", (6, 6)).save(tmp_path / "source/new.png")
    with pytest.raises(UserError, match="the source has changed"):
        begin(config)


def test_a_complete_data_set_whose_source_changed_is_not_called_complete(config, tmp_path):
    config = config.model_copy(update={"shard_samples": 1000, "max_bad_fraction": 0.5})
    assert not ingest(config)["complete"]
    assert ingest(config)["complete"]
    caption = tmp_path / "source/04.txt"
    before = caption.read_text()
    caption.write_text("another caption")
    with pytest.raises(UserError, match="is of files that have changed in the source since"):
        ingest(config)
    caption.write_text(before)
    assert ingest(config)["complete"]
    Image.new("RGB", (6, 6)).save(tmp_path / "source/new.png")
    with pytest.raises(UserError, match="the source has changed since"):
        ingest(config)
    (tmp_path / "source").rename(tmp_path / "elsewhere")
    assert ingest(config)["complete"]
    next((tmp_path / "out").glob("*/000000.tar")).unlink()
    with pytest.raises(UserError, match=r"names shard '000000\.tar', which is not there"):
        ingest(config)


def test_a_data_set_of_an_earlier_release_is_complete(config, tmp_path):
    config = config.model_copy(update={"shard_samples": 1000, "max_bad_fraction": 0.5})
    ingest(config)
    record = json.loads((tmp_path / "out/ingest.json").read_text())
    del record["content"]
    (tmp_path / "out/ingest.json").write_text(json.dumps(record))
    assert ingest(config)["complete"]


def test_a_folder_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "out").mkdir()
    assert not is_complete(config)
    (tmp_path / "out/thesis.doc").touch()
    with pytest.raises(UserError, match="not empty"):
        is_complete(config)
    with pytest.raises(UserError, match="is a file"):
        is_complete(config.model_copy(update={"output": str(tmp_path / "out/thesis.doc")}))


def test_too_many_bad_pairs_stop_the_run_and_may_be_allowed(config):
    with pytest.raises(UserError, match=r"3 of 25 samples cannot be used \(.*\), the first being .*max_bad_fraction"):
        write(config.model_copy(update={"max_bad_fraction": 0.1}))
    assert write(config)["splits"]["train"]["samples"] == 22


def test_nothing_usable(config, tmp_path):
    for path in (tmp_path / "source").glob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="has no usable pair: 25 no_caption"):
        write(config.model_copy(update={"max_bad_fraction": 1.0}))


def test_the_order_is_a_function_of_the_seed(config, tmp_path):
    write(config)
    other = config.model_copy(update={"seed": 1, "output": str(tmp_path / "other")})
    write(other)
    one, two = captions_of(tmp_path / "out/train"), captions_of(tmp_path / "other/train")
    assert one != two
    assert sorted(one) == sorted(two)
