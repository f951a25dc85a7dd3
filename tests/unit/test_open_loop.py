"""The load generator against a real server of a known capacity: what it sends, when, and that no wait is hidden."""

import asyncio
import json
import threading
from collections import Counter

import pytest

from benchmarks.open_loop import Load, Outcome, arrivals, percentile, send

SERVICE_S = 0.05


class SlowServer:
    """Works on one request at a time, SERVICE_S each, in a thread of its own; can be told to do otherwise."""

    def __init__(self):
        self.bodies, self.connections, self.status = [], 0, b"200 OK"
        self.stall_at, self.stall_s, self.close_every, self.chunked = None, 0.0, None, False
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._started.wait()

    async def _run(self):
        self._loop, self._over, self._turn = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/path"
        self._started.set()
        await self._over.wait()
        server.close()

    def stop(self):
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                body = await reader.readexactly(length)
                async with self._turn:
                    self.bodies.append((head, body))
                    await asyncio.sleep(self.stall_s if len(self.bodies) == self.stall_at else SERVICE_S)
                if self.chunked:
                    answer = b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
                else:
                    answer = b"content-length: 2\r\n\r\nok"
                # In pieces, as networks deliver.
                writer.write(b"HTTP/1.1 " + self.status + b"\r\nServer-Timing: work;dur=50\r\n" + answer[:5])
                await writer.drain()
                await asyncio.sleep(0)
                writer.write(answer[5:])
                if self.close_every and len(self.bodies) % self.close_every == 0:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
def server():
    server = SlowServer()
    yield server
    server.stop()


@pytest.fixture
def load(server, tmp_path):
    """Makes a load of three distinct bodies."""
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text("".join(json.dumps({"body": number}) + "\n" for number in range(3)))

    def make(duration_s, **options):
        return Load(server.url, str(bodies), duration_s, **options)

    return make


def test_below_the_capacity_latency_is_the_servers_own_and_does_not_grow(server, load):
    outcome = send(load(2.0, rate=10.0, even=True))
    assert outcome.status == [200] * 20 and outcome.due_s == [number / 10 for number in range(20)]
    assert outcome.latencies_ms()[0] >= 1e3 * SERVICE_S
    assert outcome.growth() < 0.3
    assert set(outcome.timings) == {"work;dur=50"}


def test_above_the_capacity_latency_grows_with_the_queue(server, load):
    outcome = send(load(2.0, rate=30.0, even=True))
    assert outcome.status == [200] * 60
    waits = [done - due for done, due in zip(outcome.done_s, outcome.due_s, strict=True)]
    # Each request waits for all before it: the last one for 60 * 50 ms less the two seconds that have gone by.
    assert waits[-1] > waits[30] > waits[0] and waits[-1] > 0.9
    assert outcome.growth() > 0.4  # 1.5 times the capacity: half a second each second, and more where sleeps are long


def test_a_stall_shows_in_all_requests_that_were_due_meanwhile(server, load):
    server.stall_at, server.stall_s = 5, 1.0
    outcome = send(load(2.0, rate=10.0, even=True))
    assert outcome.status == [200] * 20
    # A client that waits for its answers would have had one slow request.
    waits = [done - due for done, due in zip(outcome.done_s, outcome.due_s, strict=True)]
    assert sum(wait > 0.3 for wait in waits) >= 6
    assert outcome.summary()["p95_ms"] > 800


def test_waiting_for_a_free_connection_is_part_of_the_latency(server, load):
    outcome = send(load(1.0, rate=40.0, even=True, connections=1))
    assert outcome.status == [200] * 40 and server.connections == 1
    assert outcome.done_s == sorted(outcome.done_s)
    assert outcome.done_s[-1] - outcome.due_s[-1] > 0.9
    assert outcome.sent_s[-1] - outcome.due_s[-1] > 0.8


def test_connections_are_kept_and_bodies_sent_in_turn(server, load):
    send(load(1.0, rate=10.0, even=True))
    assert server.connections < 10
    assert [json.loads(body)["body"] for _, body in server.bodies] == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert all(head.startswith(b"POST /path HTTP/1.1\r\n") for head, _ in server.bodies)


def test_a_fixed_number_is_outstanding_where_the_loop_is_closed(server, load):
    outcome = send(load(1.5, concurrency=4))
    assert set(outcome.status) == {200} and server.connections == 4
    # One at a time is served, so a request waits for three others.
    middle = outcome.latencies_ms()[len(outcome.status) // 2]
    assert middle > 3.5 * 1e3 * SERVICE_S
    assert len(outcome.status) / 2 <= 1.5 / SERVICE_S
    assert 5 < outcome.throughput(0.3) <= 1.02 / SERVICE_S


def test_refusals_are_counted_and_kept_out_of_latencies(server, load):
    server.status = b"429 Too Many Requests"
    outcome = send(load(0.5, rate=10.0, even=True))
    figures = outcome.summary()
    assert (figures["requests"], figures["answered"], figures["refused"], figures["unanswered"]) == (5, 0, 5, 0)
    assert outcome.latencies_ms() == [] and outcome.throughput() == 0


def test_what_is_never_answered_counts_with_as_long_as_it_was_waited_for(server, load):
    server.stall_at, server.stall_s = 1, 5.0
    outcome = send(load(0.5, rate=10.0, even=True, timeout_s=1.0))
    figures = outcome.summary()
    assert (figures["answered"], figures["unanswered"]) == (0, 5)
    assert figures["p50_ms"] >= 1_000


def test_a_server_that_does_not_listen_answers_nothing(server, load, tmp_path):
    gone = load(0.5, rate=10.0, even=True)
    server.stop()
    assert send(gone).status == [0] * 5
    assert set(send(load(0.3, concurrency=2)).status) == {0}


@pytest.mark.parametrize("chunked", [False, True])
def test_connections_that_the_server_closes_are_made_anew(server, load, chunked):
    server.close_every, server.chunked = 3, chunked
    outcome = send(load(1.5, rate=10.0, even=True))
    assert Counter(outcome.status) == {200: 15}
    assert server.connections >= 5


def test_poisson_arrivals_repeat_with_their_seed_and_have_its_spread():
    times = arrivals(50.0, 100.0, even=False, seed=3)
    assert times == arrivals(50.0, 100.0, even=False, seed=3) != arrivals(50.0, 100.0, even=False, seed=4)
    assert times == sorted(times) and times[0] > 0 and times[-1] < 100.0
    assert 4_700 < len(times) < 5_300
    counts = [sum(second <= time < second + 1 for time in times) for second in range(100)]
    mean = sum(counts) / 100
    assert 0.6 < sum((count - mean) ** 2 for count in counts) / 100 / mean < 1.6  # of a Poisson process: 1


def outcome(due_s, done_s, duration_s, sent_s=None):
    rows = len(due_s)
    return Outcome(duration_s, due_s, sent_s or due_s, done_s, [200] * rows, [""] * rows, 0.0)


def test_throughput_counts_the_share_of_each_life_in_the_window():
    # Batches of four each second, each request waiting through one more: four a second, wherever the window lies.
    due = [float(second) for second in range(20) for _ in range(4)]
    answers = outcome(due, [time + 2 for time in due], 15.0)
    assert [answers.throughput(warm_up) for warm_up in (2.0, 3.0, 14.0)] == pytest.approx([4, 4, 4])
    for warm_up in (2.4, 3.7, 5.5):
        assert answers.throughput(warm_up) == pytest.approx(4, rel=0.06)


def test_growth_is_what_is_offered_over_what_is_answered_less_one():
    due = [index / 30 for index in range(300)]
    done = [(index + 1) / 20 for index in range(300)]
    assert outcome(due, done, 10.0).growth() == pytest.approx(0.5)
    assert outcome(due, [time + 0.05 for time in due], 10.0).growth() == pytest.approx(0)


def test_percentiles_are_nearest_ranks():
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, share) for share in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7.0], 99) == 7.0 and percentile([1.0, 2.0, 3.0], 50) == 2.0
