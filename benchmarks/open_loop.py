"""Open-loop load over HTTP: a request leaves when its time comes, whether or not earlier ones have been answered.

A client that waits for an answer before it asks again slows down together with the server and hides the server's
queue (coordinated omission). Here arrivals are drawn beforehand, and latency counts from the moment a request was
due, so time that it spent waiting for anything at all is in it.

It runs in a process of its own that needs the standard library alone: `python -m benchmarks.open_loop`
reads a `Load` as JSON and writes what happened.
"""

import asyncio
import gc
import json
import math
import random
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any
from urllib.parse import urlsplit

_NO_ANSWER = 0


@dataclass(frozen=True)
class Load:
    """What to send. With `rate` the loop is open; with `concurrency` that many requests are always outstanding."""

    url: str
    bodies: str
    """File with a JSON body a line; requests take them in turn."""
    duration_s: float
    rate: float | None = None
    concurrency: int | None = None
    even: bool = False
    """Arrivals at equal distances; otherwise a Poisson process."""
    seed: int = 0
    timeout_s: float = 10.0
    """From the moment a request was due; what is not answered by then has failed."""
    connections: int = 256
    """Most connections; requests that find none free wait here, which their latency contains."""


@dataclass(eq=False)
class Request:
    """One request. Times in seconds since the start of the load."""

    due_s: float
    payload: bytes
    sent_s: float = 0.0
    done_s: float = 0.0
    status: int = _NO_ANSWER
    timing: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a load: a row for each request, in the order in which they were due."""

    duration_s: float
    due_s: list[float]
    sent_s: list[float]
    done_s: list[float]
    status: list[int]
    """0 where no answer came; done_s is then when it was given up."""
    timings: list[str]
    cpu_s: float
    """What the load generator itself took of the processor."""

    @property
    def answered(self) -> list[int]:
        """Rows with a 2xx answer."""
        return [row for row, status in enumerate(self.status) if 200 <= status < 300]

    def latencies_ms(self) -> list[float]:
        """Sorted, of what was answered and, as far as it waited, of what never was; refusals are left out."""
        rows = (row for row, status in enumerate(self.status) if status == _NO_ANSWER or 200 <= status < 300)
        return sorted(1e3 * (self.done_s[row] - self.due_s[row]) for row in rows)

    def throughput(self, warm_up_s: float = 0.0) -> float:
        """Answers a second between the warm-up and the end of a load that keeps a fixed number outstanding.

        A request counts with the share of its life that lies between the two, so that neither the bursts in which a
        batching server answers nor the few answers of a slow one make the figure jump.
        """
        begin, end, total = warm_up_s, self.duration_s, 0.0
        for row in self.answered:
            life = self.done_s[row] - self.sent_s[row]
            total += max(0.0, min(end, self.done_s[row]) - max(begin, self.sent_s[row])) / life
        return total / (end - begin)

    def growth(self) -> float:
        """Seconds by which latency grows in a second: the slope over the due times.

        A server that answers a share s of what is offered lets it grow by 1 / s - 1; one that keeps up, by 0.
        """
        rows = [row for row, status in enumerate(self.status) if status == _NO_ANSWER or 200 <= status < 300]
        if len(rows) < 2:
            return 0.0
        x = [self.due_s[row] for row in rows]
        y = [self.done_s[row] - self.due_s[row] for row in rows]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        spread = sum((a - mean_x) ** 2 for a in x)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0

    def summary(self) -> dict[str, Any]:
        """Figures for one load: rates a second, latencies in ms, counts of what went wrong.

        `sent_late_p99_ms` is how long requests waited here: a millisecond on a busy machine, and more only where all
        connections were taken. `client_cpu_ms` is what a request costs this program, idle waiting included.
        """
        latencies = self.latencies_ms()
        late = sorted(1e3 * (sent - due) for sent, due in zip(self.sent_s, self.due_s, strict=True))
        return {
            "offered_per_s": round(len(self.due_s) / self.duration_s, 2),
            "requests": len(self.due_s),
            "answered": len(self.answered),
            "refused": sum(status >= 300 for status in self.status),
            "unanswered": self.status.count(_NO_ANSWER),
            **{f"p{share}_ms": round(percentile(latencies, share), 2) for share in (50, 95, 99)},
            "growth_s_per_s": round(self.growth(), 4),
            "sent_late_p99_ms": round(percentile(late, 99), 3),
            "client_cpu_ms": round(1e3 * self.cpu_s / max(1, len(self.due_s)), 3),
        }


def percentile(ordered: list[float], share: float) -> float:
    """Nearest rank in a sorted list; NaN where it is empty."""
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)] if ordered else math.nan


def send(load: Load) -> Outcome:
    """Send the load from a process of its own, and wait until it is answered or given up."""
    command = [sys.executable, "-m", "benchmarks.open_loop"]
    done = subprocess.run(command, input=json.dumps(asdict(load)), stdout=subprocess.PIPE, text=True, check=True)
    return Outcome(**json.loads(done.stdout))


def arrivals(rate: float, duration_s: float, even: bool, seed: int) -> list[float]:
    """Due times in [0, duration_s)."""
    if even:
        return [index / rate for index in range(int(rate * duration_s))]
    generator, times, now = random.Random(seed), [], 0.0
    while (now := now + generator.expovariate(rate)) < duration_s:
        times.append(now)
    return times


class _Connection(asyncio.Protocol):
    """A keep-alive HTTP/1.1 connection with at most one request on it."""

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._body_at = self._length = 0  # a length of -1: chunked
        self.request: Request | None = None
        self._used = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def send(self, request: Request) -> None:
        assert self._transport is not None
        self.request = request
        self._buffer.clear()
        self._body_at = 0
        self._transport.write(request.payload)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if not self._body_at:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._read_head(bytes(buffer[:end]))
            self._body_at = end + 4
        chunked, size = self._length < 0, len(buffer) - self._body_at
        complete = buffer.endswith(b"0\r\n\r\n") if chunked else size >= self._length
        if complete and self.request is not None:
            request, self.request = self.request, None
            request.status = int(buffer[9:12])
            self._used = True
            self._client.finished(self, request)

    def _read_head(self, head: bytes) -> None:
        self._length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            name = name.lower()
            if name == b"content-length":
                self._length = int(value)
            elif name == b"transfer-encoding":
                self._length = -1
            elif name == b"server-timing" and self.request is not None:
                self.request.timing = value.decode("latin-1").strip()

    def connection_lost(self, error: Exception | None) -> None:
        request, self.request = self.request, None
        # A server may close an idle connection just as the next request leaves: clients send that one again.
        again = request is not None and self._used and not self._buffer
        self._client.lost(self, request, again)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Client:
    """Sends requests when they are due over connections that are kept."""

    def __init__(self, load: Load, payloads: Iterator[bytes]) -> None:
        self._load, self._payloads = load, payloads
        self._loop = asyncio.get_running_loop()
        address = urlsplit(load.url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._opening = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: deque[Request] = deque()
        self._due: deque[float] = deque()
        self._unfinished: set[Request] = set()
        self._over = asyncio.Event()
        self._start = 0.0
        self.requests: list[Request] = []

    def now(self) -> float:
        return time.perf_counter() - self._start

    async def run(self) -> float:
        """Returns the processor time that it took."""
        load = self._load
        await asyncio.gather(*(self._open() for _ in range(load.concurrency or 1)))
        cpu_s, self._start = time.process_time(), time.perf_counter()
        if load.concurrency is not None:
            for _ in range(load.concurrency):
                self._issue(0.0)
        else:
            assert load.rate is not None
            self._due.extend(arrivals(load.rate, load.duration_s, load.even, load.seed))
            self._issue_due()
        expiry = self._loop.create_task(self._expire())
        await self._over.wait()
        expiry.cancel()
        cpu_s = time.process_time() - cpu_s
        for connection in list(self._all):
            connection.close()
        return cpu_s

    def _issue_due(self) -> None:
        while self._due and self._due[0] <= self.now():
            self._issue(self._due.popleft())
        if self._due:
            self._loop.call_later(self._due[0] - self.now(), self._issue_due)
        self._check_over()

    def _issue(self, due_s: float) -> None:
        request = Request(due_s, next(self._payloads))
        self.requests.append(request)
        self._unfinished.add(request)
        self._dispatch(request)

    def _dispatch(self, request: Request) -> None:
        if self._idle:
            self._send(self._idle.pop(), request)
            return
        self._waiting.append(request)
        self._open_more()

    def _open_more(self) -> None:
        if len(self._all) + self._opening < self._load.connections and self._opening < len(self._waiting):
            task = self._loop.create_task(self._open())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _send(self, connection: _Connection, request: Request) -> None:
        request.sent_s = self.now()
        connection.send(request)

    async def _open(self) -> None:
        self._opening += 1
        try:
            _, connection = await self._loop.create_connection(lambda: _Connection(self), self._host, self._port)
        except OSError:
            if self._waiting:
                self._give_up(self._waiting.popleft())
            return
        finally:
            self._opening -= 1
        self._all.add(connection)
        self._free(connection)

    def _free(self, connection: _Connection) -> None:
        while self._waiting:
            request = self._waiting.popleft()
            if request in self._unfinished:
                self._send(connection, request)
                return
        self._idle.append(connection)

    def finished(self, connection: _Connection, request: Request) -> None:
        """The connection's request was answered."""
        self._end(request)
        self._free(connection)

    def lost(self, connection: _Connection, request: Request | None, again: bool) -> None:
        """The connection is gone, maybe with a request on it."""
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if request is not None and request in self._unfinished:
            if again:
                self._dispatch(request)
            else:
                self._give_up(request)
        self._open_more()

    def _give_up(self, request: Request) -> None:
        if request in self._unfinished:
            request.sent_s = request.sent_s or self.now()
            self._end(request)

    def _end(self, request: Request) -> None:
        request.done_s = self.now()
        self._unfinished.discard(request)
        if self._load.concurrency is not None and request.done_s < self._load.duration_s:
            # Not from here: where nothing can be reached this would call itself without end.
            self._loop.call_soon(self._issue_next)
        self._check_over()

    def _issue_next(self) -> None:
        if not self._over.is_set():
            self._issue(self.now())

    def _check_over(self) -> None:
        closed = self._load.concurrency is not None and self.now() < self._load.duration_s
        if not self._due and not self._unfinished and not closed:
            self._over.set()

    async def _expire(self) -> None:
        """Give up what was not answered in time; its connection goes, for the answer may still come over it."""
        while True:
            await asyncio.sleep(0.2)
            limit = self.now() - self._load.timeout_s
            busy = {connection.request: connection for connection in self._all if connection.request is not None}
            for request in [request for request in self._unfinished if request.due_s < limit]:
                self._give_up(request)
                if request in busy:
                    busy[request].close()
            self._check_over()


def _payloads(load: Load) -> list[bytes]:
    address = urlsplit(load.url)
    headers = {"host": address.netloc, "content-type": "application/json"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    payloads = []
    with open(load.bodies, "rb") as file:  # noqa: PTH123
        for line in file:
            body = line.rstrip(b"\n")
            head = f"POST {address.path} HTTP/1.1\r\n{lines}content-length: {len(body)}\r\n\r\n"
            payloads.append(head.encode() + body)
    return payloads


async def _send_all(load: Load) -> tuple[_Client, float]:
    client = _Client(load, cycle(_payloads(load)))
    return client, await client.run()


def _main() -> None:
    load = Load(**json.load(sys.stdin))
    gc.disable()  # a collection would stand in front of whichever request is due
    # epoll, as asyncio has it, wakes up to a millisecond late; select takes its time-out in microseconds.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        client, cpu_s = runner.run(_send_all(load))
    requests = client.requests
    outcome = Outcome(
        duration_s=load.duration_s,
        due_s=[request.due_s for request in requests],
        sent_s=[request.sent_s for request in requests],
        done_s=[request.done_s for request in requests],
        status=[request.status for request in requests],
        timings=[request.timing for request in requests],
        cpu_s=cpu_s,
    )
    json.dump(asdict(outcome), sys.stdout)


if __name__ == "__main__":
    _main()
