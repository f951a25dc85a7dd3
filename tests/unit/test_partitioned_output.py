"""An output folder of parts: which chunks a part has, what is missing, and whose the folder is."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayclip.data.formats.tar import Span
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.orchestration.batch.partitioned_output import (
    Part,
    PartitionedOutput,
    add,
    check_bad,
    format_causes,
    open_complete,
    plan_parts,
)

IDENTITY = {
    "kind": "embed",
    "model_version": "letters/1",
    "weights_sha256": "aa",
    "source": "/data",
    "source_digest": "bb",
    "part_samples": 10,
    "what": "both",
}
TALLY = {"rows": {"samples": 3, "bad": 1}, "causes": {"no_image": 1}}


@pytest.fixture
def folder(tmp_path):
    return PartitionedOutput(tmp_path / "out", IDENTITY, 3)


def write(folder, number):
    table = pa.table({"id": [f"{number}.{row}" for row in range(3)], "row": np.arange(3)})
    folder.write(number, Part(table, TALLY))


# Planning


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 50))
def test_parts_hold_every_chunk_once_and_in_order(counts, part_samples):
    manifest = Manifest.from_spans(".", [("a.tar", 1, [Span(i, 1, count) for i, count in enumerate(counts)])])
    parts = plan_parts(manifest, part_samples)
    assert [chunk for part in parts for chunk in part] == list(range(len(counts)))
    assert all(len(part) for part in parts)
    sizes = [sum(counts[chunk] for chunk in part) for part in parts]
    # No larger than asked for but by what the last chunk has beyond.
    assert all(size - counts[part[-1]] < part_samples for size, part in zip(sizes, parts, strict=True))


def test_a_part_is_a_few_chunks():
    manifest = Manifest.from_spans(".", [("a.tar", 1, [Span(i, 1, 64) for i in range(10)])])
    assert plan_parts(manifest, 256) == [range(0, 4), range(4, 8), range(8, 10)]


# Writing and going on


def test_what_is_missing_is_what_was_not_written_whole(folder):
    folder.check()
    folder.begin()
    assert folder.missing() == ([0, 1, 2], {"rows": {"samples": 0, "bad": 0}, "causes": {}})
    write(folder, 1)
    folder.file(2).write_bytes(folder.file(1).read_bytes()[:-20])
    missing, tally = folder.missing()
    assert missing == [0, 2], "a damaged part is no part"
    assert tally == TALLY
    write(folder, 0)
    write(folder, 2)
    assert folder.missing() == ([], {"rows": {"samples": 9, "bad": 3}, "causes": {"no_image": 3}})


def test_a_part_says_what_it_was_made_from(folder):
    folder.begin()
    write(folder, 1)
    meta = json.loads(pq.read_schema(folder.file(1)).metadata[b"rayclip"])
    assert meta == {**IDENTITY, "part": 1, "tally": TALLY}
    assert pq.read_table(folder.file(1))["id"].to_pylist() == ["1.0", "1.1", "1.2"]


def test_an_output_is_complete_with_its_summary_and_all_parts(folder):
    folder.begin()
    for number in range(3):
        write(folder, number)
    assert folder.read_summary() is None
    with pytest.raises(UserError, match="is not complete"):
        open_complete(folder.path, "embed")
    assert folder.finish({"parts": 3, "samples": 9}) == {"parts": 3, "samples": 9}
    assert folder.read_summary() == {"parts": 3, "samples": 9}
    assert open_complete(folder.path, "embed") == (folder, {"parts": 3, "samples": 9})
    folder.file(1).unlink()
    assert folder.read_summary() is None
    with pytest.raises(UserError, match="has lost some of its 3 parts"):
        open_complete(folder.path, "embed")
    with pytest.raises(UserError, match=r"holds nothing of rayclip embed"):
        open_complete(folder.path.parent, "embed")


def test_what_a_crash_left_is_cleared_away(folder):
    folder.begin()
    (folder.path / "part-000001.parquet.partial-0123abcd").write_bytes(b"half")
    (folder.path / "part-000001.attempts").write_bytes(b".")  # of earlier releases
    folder.check()
    with folder.writing():
        assert {path.name for path in folder.path.iterdir()} == {"embed.json", "owner.json", "owner.lock"}
        (folder.path / "part-000001.parquet.partial-4567abcd").write_bytes(b"half")
    assert {path.name for path in folder.path.iterdir()} == {"embed.json"}


# Whose the folder is


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_version": "letters/2"}, "is by model letters/1, this run is by letters/2"),
        ({"weights_sha256": "cc"}, "is by other weights under the same name letters/1"),
        ({"source": "/other", "source_digest": "cc"}, "was made from '/data' as it was"),
        ({"what": "texts"}, "has both, not texts"),
        ({"part_samples": 20}, "has parts of 10 samples, not of 20"),
    ],
)
def test_an_output_of_something_else_is_left_alone(folder, change, said):
    folder.begin()
    with pytest.raises(UserError, match=said) as caught:
        PartitionedOutput(folder.path, {**IDENTITY, **change}, 3).check()
    assert "\n" not in str(caught.value)
    assert "choose another output, or delete that folder" in str(caught.value)


def test_a_data_set_that_was_moved_is_the_same(folder):
    folder.begin()
    PartitionedOutput(folder.path, {**IDENTITY, "source": "/moved"}, 3).check()


def test_a_folder_of_other_things_is_left_alone(folder):
    folder.path.mkdir()
    folder.check()
    (folder.path / "thesis.txt").write_text("all there is")
    with pytest.raises(UserError, match=r"is not empty and holds nothing of rayclip embed"):
        folder.check()
    with pytest.raises(UserError, match="is a file, not a folder"):
        PartitionedOutput(folder.path / "thesis.txt", IDENTITY, 3).check()


# Counts


def test_tallies_are_summed_by_group_the_largest_first():
    total = add([TALLY, {"rows": {"samples": 2, "bad": 2, "pictures": 1}, "causes": {"no_caption": 2}}])
    assert total == {"rows": {"samples": 5, "bad": 3, "pictures": 1}, "causes": {"no_caption": 2, "no_image": 1}}
    assert format_causes(total) == "2 no_caption, 1 no_image"


def test_more_errors_than_allowed():
    tally = {"rows": {"samples": 1000, "bad": 10}, "causes": {"no_image": 10}}
    check_bad(tally, 0.01)
    with pytest.raises(UserError, match=r"10 of 1,000 samples cannot be used \(10 no_image\); .* allows 1%"):
        check_bad(tally, 0.009)


def test_a_host_that_has_another_folder_at_the_path_is_told_apart(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rayclip.orchestration.batch.partitioned_output._MARKER_WAIT_S", 0)
    with folder.marked() as marker:
        folder.check_marker(marker)
        folder.path.rename(tmp_path / "of another host")
        folder.path.mkdir()
        with pytest.raises(UserError, match=r"is not the same folder on host '.*give a path that all nodes share"):
            folder.check_marker(marker)
    assert not list(folder.path.iterdir())
