"""What a sweep is made of: what Ray Tune asks, its journal, its table of trials, how many trials a cluster places."""

import io
import math

import numpy as np
import pytest

from rayclip.config import Choices, Range, SearchPlan
from rayclip.orchestration.cluster.resources import num_times_placed
from rayclip.orchestration.sweep import table as sweep_table
from rayclip.orchestration.sweep.search import Journal, suggest
from rayclip.orchestration.sweep.table import SweepTable, TrialLine
from rayclip.scaling.search import draw

SPACE = {
    "optimizer.lr": Range(low=1e-4, high=1e-2, log=True),
    "optimizer.warmup_samples": Range(low=1, high=4),
    "batch_size": Choices(choices=(32, 64)),
    "data.crop_scale": Choices(choices=([0.5, 1.0], [0.9, 1.0])),
}


def test_tpe_goes_where_results_are_good_and_is_a_function_of_them():
    plan = SearchPlan(space=SPACE, num_trials=40, algorithm="tpe", seed=5)
    known = [
        (values, -abs(math.log10(values["optimizer.lr"]) + 3)) for values in (draw(SPACE, 0, i) for i in range(30))
    ]
    suggested = [suggest(plan, 30 + i, known) for i in range(10)]
    assert suggested[3] == suggest(plan, 33, known)
    distance = np.abs(np.log10([values["optimizer.lr"] for values in suggested]) + 3)
    assert np.mean(distance) < 0.35, "a blind draw is 0.5 away"
    for values in suggested:
        assert values["batch_size"] in (32, 64) and values["data.crop_scale"] in ([0.5, 1.0], [0.9, 1.0])
        assert isinstance(values["optimizer.warmup_samples"], int)


def test_a_journal_that_a_crash_cut_off_loses_its_last_line_only(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.add(trial="a", values={"x": 1})
    journal.add(trial="a", samples_seen=10, value=0.5, goes_on=False)
    with path.open("a") as file:
        file.write('{"trial": "b", "val')
    journal = Journal(path)
    assert journal.values("a") == {"x": 1} and journal.values("b") is None
    assert journal.stopped_at("a")["samples_seen"] == 10 and journal.stopped_at("b") is None
    journal.add(trial="b", values={"x": 2})
    assert Journal(path).values("b") == {"x": 2}


@pytest.mark.parametrize(
    ("nodes", "placed"),
    [
        ([{"CPU": 4}], 1),  # two workers and a reader take three
        ([{"CPU": 6}], 2),
        ([{"CPU": 2}, {"CPU": 2}, {"CPU": 2}], 2),
        ([{"CPU": 1}], 0),
        ([{"CPU": 1.5}, {"CPU": 1.5}], 0),  # no node has room for the reader
    ],
)
def test_as_many_trials_at_a_time_as_all_their_workers_find_nodes(nodes, placed):
    assert num_times_placed([{"CPU": 1}, {"CPU": 1}, {"CPU": 1}], nodes) == placed


@pytest.fixture
def clock(clock_of):
    return clock_of(sweep_table)


def test_off_a_terminal_a_state_is_a_line_and_the_rest_one_now_and_then(clock):
    stream = io.StringIO()
    table = SweepTable([TrialLine("a", 100, 1.0), TrialLine("b", 100, 3.0)], stream)
    table.change("a", state="training", rate=10.0, samples=20, loss="2.000")
    for _ in range(30):
        clock.now += 1
        table.change("a", samples=50)
        table.refresh()
    table.change("b", state="failed", reason="no room")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a  training  20/100  10/s  2.000  0:08"
    assert lines[-1] == "b  failed  0/100  no room"
    assert len(lines) == 5
    # 50 of 400 units in 10 s; 350 are left.
    assert lines[1] == "2 trials: 1 training, 0 finished, 0 stopped, 0 failed; 50/200 samples; eta 1:10"


def test_a_terminal_has_one_table_redrawn_at_most_each_second(clock, terminal):
    stream = terminal
    table = SweepTable([TrialLine("a", 100, 1.0), TrialLine("b", 100, 1.0)], stream)
    for _ in range(20):
        clock.now += 0.26
        table.refresh()
    assert stream.getvalue().count("trial ") == 5
    table.note("a finished")
    table.refresh(at_once=True)
    assert stream.getvalue().count("\x1b[4F\x1b[J") == 5, "each drawing and the note take the place of the table before"


def test_a_terminal_too_low_for_all_shows_those_that_go(clock, monkeypatch, terminal):
    monkeypatch.setenv("LINES", "8")
    monkeypatch.setenv("COLUMNS", "80")
    stream = terminal
    table = SweepTable([TrialLine(f"t{i:02}", 10, 1.0) for i in range(40)], stream)
    table.change("t30", state="training", rate=1.0)
    table.refresh(at_once=True)
    assert "t30" in stream.getvalue() and "t00" in stream.getvalue() and "t39" not in stream.getvalue()
    assert stream.getvalue().count("\n") <= 8
