"""What people see of a run while it goes, and what a run's folder remembers of how it was started."""

import io
import json
import os
import sys

import pytest

from rayclip.errors import UserError
from rayclip.orchestration.cluster import progress
from rayclip.orchestration.cluster.progress import ProgressLine
from rayclip.orchestration.train.run_folder import RunFolder

CLEAR = "\r\x1b[K"


@pytest.fixture
def clock(clock_of):
    return clock_of(progress)


def test_a_terminal_has_one_line_that_is_rewritten(clock, terminal):
    stream = terminal
    line = ProgressLine(100_000, stream=stream)
    for done in (1000, 2000, 3000):
        clock.now += 1
        line.update(done, loss="1.234")
    line.close()
    shown = [f"{CLEAR}samples {n},000/100,000  1,000/s  loss 1.234  eta {eta}" for n, eta in ((1, "1:39"), (2, "1:38"))]
    last = f"{CLEAR}samples 3,000/100,000  1,000/s  loss 1.234  eta 1:37\n"
    assert stream.getvalue() == "".join(shown) + last


def test_a_terminal_is_not_rewritten_more_than_five_times_a_second(clock, terminal):
    stream = terminal
    line = ProgressLine(1000, stream=stream)
    for done in range(100):
        clock.now += 0.01
        line.update(done)
    assert 4 <= stream.getvalue().count(CLEAR) <= 6
    line.close()
    assert stream.getvalue().endswith("\n")
    assert "samples 99/1,000" in stream.getvalue().rpartition(CLEAR)[2]


def test_a_file_gets_a_line_now_and_then_and_the_last(clock):
    stream = io.StringIO()
    line = ProgressLine(1000, "shards", stream=stream, every_s=10)
    for done in range(1, 26):
        clock.now += 1
        line.update(done)
    line.close()
    lines = stream.getvalue().splitlines()
    assert [text.split("  ")[0] for text in lines] == [f"shards {n}/1,000" for n in (1, 11, 21, 25)]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_the_last_state_is_not_written_twice(clock):
    stream = io.StringIO()
    line = ProgressLine(10, stream=stream)
    clock.now += 1
    line.update(10)
    line.close()
    assert stream.getvalue() == "samples 10/10  10/s  eta 0:00\n"


@pytest.mark.parametrize("on_terminal", [True, False])
def test_nothing_done_leaves_nothing_behind(on_terminal, terminal):
    stream = terminal if on_terminal else io.StringIO()
    ProgressLine(10, stream=stream).close()
    assert stream.getvalue() == ""


def test_notes_stay_above_the_line(clock, terminal):
    stream = terminal
    line = ProgressLine(10, stream=stream)
    clock.now += 1
    line.update(5)
    line.note("half of it")
    line.close()
    state = "samples 5/10  5/s  eta 0:01"
    assert stream.getvalue() == f"{CLEAR}{state}{CLEAR}half of it\n{CLEAR}{state}\n"
    stream = io.StringIO()
    ProgressLine(10, stream=stream).note("plain")
    assert stream.getvalue() == "plain\n"


def test_what_an_earlier_start_did_does_not_count_as_speed(clock):
    stream = io.StringIO()
    line = ProgressLine(10_000, start=4000, stream=stream)
    clock.now += 2
    line.update(4000)
    clock.now += 8
    line.update(4500)
    line.close()
    first, last = stream.getvalue().splitlines()
    assert first == "samples 4,000/10,000  0/s  eta ?"
    assert last == "samples 4,500/10,000  50/s  eta 1:50"


def test_a_given_rate_is_shown_and_long_waits_have_hours(clock):
    stream = io.StringIO()
    ProgressLine(100_000, stream=stream).update(10_000, rate=12.5)
    assert stream.getvalue() == "samples 10,000/100,000  12/s  eta 2:00:00\n"


def test_progress_goes_to_standard_error(capsys, clock):
    line = ProgressLine(10)
    assert line.stream is sys.stderr
    line.update(3, rate=1.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("samples 3/10")


# The folder of a run


def test_a_record_is_kept_with_the_run(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "a")
    assert folder.read_record() is None
    parts = [{"path": "data", "weight": 1.0, "num_samples": 3}]
    folder.write_record({"seed": 1}, "some-id", parts)
    kept = {"mlflow_run_id": "some-id", "generation": 1, "config": {"seed": 1}, "data": parts}
    assert folder.read_record() == kept
    assert [path.name for path in folder.path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({"seed": 1}, {"seed": 2}, "a run with seed = 1, not 2:"),
        ({"a": {"b": {"c": 1, "d": 2}}}, {"a": {"b": {"c": 1, "d": 3}}}, "a run with a.b.d = 2, not 3:"),
        ({"a": {"b": 1}}, {"a": {"b": 1, "new": 5}}, "a run with a.new = None, not 5:"),
        ({"model": "x"}, {"model": {"y": 1}}, "a run with model = x, not {'y': 1}:"),
    ],
)
def test_a_run_with_other_settings_is_refused(tmp_path, before, now, line):
    with pytest.raises(UserError, match="give this one another name") as caught:
        RunFolder(tmp_path).check_same({"config": before}, now)
    assert line in str(caught.value)


def test_what_may_change_and_new_settings_without_a_value_are_let_through(tmp_path):
    before = {"seed": 1, "cluster": {"num_workers": 1}, "optimizer": {"lr": 1.0}}
    now = {"seed": 1, "cluster": {"num_workers": 8}, "optimizer": {"lr": 1.0, "new": None}, "samples": None}
    RunFolder(tmp_path).check_same({"config": before}, now)


def test_a_list_of_checkpoints_that_a_crash_cut_off_is_repaired(tmp_path):
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    listed = folder.checkpoints / "checkpoint_manager_snapshot.json"
    listed.write_text('{"checkpoint_results": [1]}')
    folder.back_up_list()
    listed.write_text('{"checkpoint_results": [1, 2')
    folder.back_up_list()  # a list that is cut off is not copied
    folder.repair_list()
    assert json.loads(listed.read_text()) == {"checkpoint_results": [1]}
    listed.write_text('{"checkpoint_results": [1, 2]}')
    folder.repair_list()  # a whole one is left alone
    assert json.loads(listed.read_text()) == {"checkpoint_results": [1, 2]}


def test_a_terminal_that_has_gone_ends_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    line = ProgressLine(10, stream=os.fdopen(writer, "w", closefd=False))
    line.update(5, rate=1.0)
    line.note("half")
    line.close()
    os.close(writer)
