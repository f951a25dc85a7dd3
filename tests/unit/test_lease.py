"""One process at a time holds a folder: on disk and in S3, against races, kills and holders elsewhere."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from rayclip.io import lease as lease_module
from rayclip.io import s3 as s3_module
from rayclip.io.conditional import encode
from rayclip.io.lease import FILE_NAME, HeldError, LostError, hold
from rayclip.io.paths import storage_path

CONTENDER = """
import sys, time
from rayclip.io.lease import HeldError, hold
from rayclip.io.paths import storage_path
for line in sys.stdin:
    try:
        with hold(storage_path(line.strip()), "the folder"):
            print("held", flush=True)
            sys.stdin.readline()
        print("released", flush=True)
    except HeldError as error:
        print(error, flush=True)
"""


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path):
    if request.param == "disk":
        return storage_path(tmp_path / "folder")
    request.getfixturevalue("s3")
    return storage_path(f"s3://data/lease-{tmp_path.name}")


@pytest.fixture
def start(request):
    """Starts a process that wants the folders it is told of, one after another."""
    processes = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", CONTENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def ask(process, line):
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def write_owner(folder, **changes):
    """A record of a holder that is not there."""
    record = {**lease_module._new_record(1.0), **changes}
    lease_module._file_in(folder).create(encode(record))
    return record


def test_the_second_is_refused_and_told_who_holds_it_since_when(folder):
    with hold(folder, "run 'mine'"):
        record = json.loads((folder / FILE_NAME).read_text())
        with pytest.raises(HeldError) as raised, hold(folder, "run 'mine'"):
            pass
        expected = f"one at a time: run 'mine' is held by process {os.getpid()} on host {record['host']} since"
        assert str(raised.value) == f"{expected} {record['since']}"
    assert not (folder / FILE_NAME).is_file()
    with hold(folder, "run 'mine'"):
        pass


def test_of_four_that_want_it_at_once_one_gets_it(folder, start):
    processes = [start() for _ in range(4)]
    for number in range(10):
        place = f"{folder}/{number}"
        for process in processes:
            ask(process, place)
        answers = [process.stdout.readline().strip() for process in processes]
        winners = [process for process, answer in zip(processes, answers, strict=True) if answer == "held"]
        assert len(winners) == 1, answers
        assert all("one at a time" in answer for answer in answers if answer != "held")
        ask(winners[0], "")
        assert winners[0].stdout.readline() == "released\n"


def test_who_was_killed_has_lost_it_at_once(folder, start):
    process = start()
    ask(process, folder)
    assert process.stdout.readline() == "held\n"
    os.kill(process.pid, signal.SIGKILL)  # and not waited for: it is a zombie now
    begun = time.monotonic()
    while time.monotonic() - begun < 10:
        try:
            with hold(folder, "the folder"):
                return
        except HeldError:  # the kernel has not got to it yet
            time.sleep(0.01)
    pytest.fail("a killed process still holds the folder")


def test_a_number_that_another_process_has_now_is_no_holder(folder):
    write_owner(folder, pid=os.getppid(), started="1")
    with hold(folder, "the folder"):
        pass


def test_a_holder_elsewhere_that_is_silent_for_a_term_has_lost_it(folder):
    write_owner(folder, machine="another", host="there")
    said = []
    begun = time.monotonic()
    with hold(folder, "the folder", term_s=1.0, say=said.append):
        assert time.monotonic() - begun >= 1.0
    assert said[0].startswith("one at a time: the folder is held by process") and "host there" in said[0]


def test_a_holder_elsewhere_that_renews_keeps_it(folder, monkeypatch):
    with hold(folder, "the folder", term_s=1.0):
        monkeypatch.setattr(lease_module, "_machine", lambda: "this one")  # the holder's record has the other name
        with pytest.raises(HeldError), hold(folder, "the folder", term_s=1.0):
            pass


def test_a_holder_that_was_robbed_learns_of_it(folder):
    with hold(folder, "the folder", term_s=0.6) as lease:
        lease.check()
        store = lease_module._file_in(folder)
        store.replace(encode(lease_module._new_record(60.0)), store.read().version)
        assert lease._lost.wait(5)
        with pytest.raises(LostError):
            lease.check()
    assert (folder / FILE_NAME).is_file()  # the other's


def test_what_a_holder_that_lost_the_folder_still_runs_is_told_to_write_nothing(folder):
    with hold(folder, "the folder") as lease:
        fence = pickle.loads(pickle.dumps(lease.fence))
        fence.check()
        file = lease_module._file_in(folder)
        file.replace(encode(lease_module._new_record(60.0) | {"pid": 17, "host": "there"}), file.read().version)
        with pytest.raises(LostError, match="silent for too long, and the folder is held by process 17 on host there"):
            fence.check()
        file.remove(file.read().version)
        with pytest.raises(LostError, match="another took it and has ended"):
            fence.check()


def test_a_holder_that_was_paused_goes_on_where_nobody_took_the_folder(folder):
    with hold(folder, "the folder") as lease:
        lease._renewed_at -= 2 * lease_module.TERM_S
        lease.check()
        lease._renewed_at -= 2 * lease_module.TERM_S
        file = lease_module._file_in(folder)
        file.replace(encode(lease_module._new_record(60.0) | {"pid": 17}), file.read().version)
        with pytest.raises(LostError, match="held by process 17"):
            lease.check()


def test_others_wait_for_the_term_that_the_holder_has(folder, monkeypatch):
    monkeypatch.setenv("RAYCLIP_LEASE_TERM_S", "0.9")
    with hold(folder, "the folder"):
        pass
    write_owner(folder, machine="another", term_s=1.5)
    begun, said = time.monotonic(), []
    with hold(folder, "the folder", say=said.append):
        assert time.monotonic() - begun >= 1.5
        assert json.loads((folder / FILE_NAME).read_text())["term_s"] == 0.9
    assert "looking for 2 s" in said[0]


def test_a_holder_that_cannot_renew_gives_up_before_others_take_it(tmp_path):
    with hold(storage_path(tmp_path / "folder"), "the folder", term_s=0.3) as lease:
        lease._file = _Unreachable()
        time.sleep(0.5)
        with pytest.raises(LostError):
            lease.check()


class _Unreachable:
    def replace(self, data, version):
        raise OSError("no route")

    def remove(self, version):
        raise OSError("no route")


def test_a_record_that_cannot_be_read_is_a_holder_elsewhere(folder):
    lease_module._file_in(folder).create(b"{half")
    with hold(folder, "the folder", term_s=0.5):
        pass


def test_a_write_whose_answer_was_lost_is_ones_own(s3, tmp_path, monkeypatch):
    folder = storage_path(f"s3://data/lost-{tmp_path.name}")
    write, calls = s3_module.write_if, []

    def lost(path, data, tag):
        calls.append(write(path, data, tag))
        return write(path, data, tag)  # tried again, as after an answer that never came

    monkeypatch.setattr(s3_module, "write_if", lost)
    with hold(folder, "the folder"):
        assert calls
