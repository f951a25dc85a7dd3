"""The service over HTTP, beside a plain open_clip server and the bare image tower, on the same machine.

For each server: its throughput, answers a second while a fixed number of requests is always outstanding; the rate it
sustains, the highest of an open-loop sweep that is answered without a growing queue; and p50, p95 and p99 at each rate
of the sweep. Ratios are of throughputs, medians over rounds in which all take their turn. The service's processes are
stopped while another is measured, since Ray's daemons take part of a core even when nobody asks.
"""

import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import workload
from benchmarks.bare import Layout, bare_model
from benchmarks.config import BenchmarkConfig
from benchmarks.open_loop import Load, Outcome, percentile, send
from benchmarks.peers import load_open_clip
from benchmarks.servers import Server
from rayclip.models.presets import preset
from rayclip.training.checkpoint import read_config

SERVICE, CACHED, PLAIN, BARE = "service", "plain_cached", "plain", "bare"
_ALL_SHARES = (0.25, 0.5, 0.75, 0.9, 0.95, 1.1)
SHARES = {SERVICE: _ALL_SHARES, CACHED: _ALL_SHARES, PLAIN: (0.5,)}
"""Rates of each server's sweep, as shares of its own throughput."""
MAX_P99_MS = 2_000
MAX_GROWTH = 0.03
"""A rate is not sustained where latency grows by more than this, seconds a second: 3% more is offered than answered."""

_SMALL = "ViT-Micro/8@32"  # the image tower of `make demo`
_FEWEST = 5  # requests of a window, which a slow server's are prolonged for
_WARM_UP_SHARE = 0.2
_START_TIMEOUT_S = 240.0
_ANSWER_TIMEOUT_S = 60.0
_LOGS = Path("runs/benchmarks")
_STAGE = re.compile(r"([\w.-]+);dur=([\d.]+)")


@dataclass(frozen=True)
class Case:
    """A model, the pictures it is asked about, and how long it is looked at."""

    name: str
    folder: Path
    pictures: list[bytes]
    batch_sizes: tuple[int, ...]
    window_s: float
    light_rate: float | None
    """Requests a second at which nothing queues on any server; None leaves that out."""
    outstanding: dict[str, int]
    """Requests outstanding while throughput is measured: few where the server would take long to work them off."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """ViT-B/32 for throughput; a small model, whose tower takes little of the time, for what the service adds."""
    load_open_clip()  # before anything is started: without it there is no peer
    window_s: float = config.window_s
    with tempfile.TemporaryDirectory() as scratch, _sigterm_unwinds():
        big = Case(
            name="ViT-B/32",
            folder=workload.write_random_checkpoint(Path(scratch) / "big", preset("ViT-B/32")),
            pictures=workload.jpegs(),
            batch_sizes=(1, 4, 8, 16, 32),
            window_s=window_s,
            light_rate=None,
            outstanding={SERVICE: 64, CACHED: 8, PLAIN: 6},
        )
        given: str | None = config.model
        folder = Path(given) if given else workload.write_random_checkpoint(Path(scratch) / "small", preset(_SMALL))
        side: int = read_config(folder)["model"]["vision"]["image_size"]
        small = Case(
            name="small",
            folder=folder,
            pictures=workload.pngs(side + side // 8),
            batch_sizes=(1, 8, 32, 64, 128),
            window_s=0.6 * window_s,
            light_rate=5.0,
            outstanding={SERVICE: 64, CACHED: 16, PLAIN: 16},
        )
        wanted = config.cases or (big.name, small.name)
        figures = {case.name: _Measurement(case, config).run() for case in (big, small) if case.name in wanted}
    summary: dict[str, Any] = {}
    if big.name in figures:
        ratios = figures[big.name]["ratios"]
        summary["throughput_ratio_vs_plain"] = ratios[PLAIN]
        summary["throughput_ratio_vs_plain_cached"] = ratios[CACHED]
        summary["ratio_vs_bare_model"] = ratios[BARE]
    if small.name in figures:
        summary["overhead_ms_p50"] = figures[small.name]["light_load"]["overhead_ms_p50"]
        summary["small_model"] = given or f"{_SMALL}, random weights"
    summary["service_settings"] = list(_settings(config))
    return summary | figures


class _Measurement:
    """One model's figures, with all its servers up and one of them asked at a time."""

    def __init__(self, case: Case, config: BenchmarkConfig) -> None:
        self._case, self._config = case, config
        self._servers: dict[str, Server] = {}
        self._windows = 0

    def run(self) -> dict[str, Any]:
        """Start everything, measure, and take it down again."""
        case = self._case
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            self._bodies = Path(folder) / "bodies.jsonl"
            workload.write_bodies(self._bodies, case.pictures)
            for name in (SERVICE, CACHED, PLAIN):
                self._servers[name] = stack.enter_context(self._server(name))
            difference = self._compare_answers()
            idle_cores = self._idle_cores()
            self._bare = stack.enter_context(bare_model(case.folder, _num_cpus()))
            with self._servers[SERVICE].paused():
                layout, layouts = self._bare.best_layout(_num_cpus(), case.batch_sizes, case.window_s / 8)
            self._say(f"bare tower, images/s: {layouts}")
            light = self._light_load(case.light_rate) if case.light_rate else None
            throughput, ratios = self._throughput(layout)
            latency = {SERVICE: self._sweep(SERVICE, throughput[SERVICE])}
            with self._servers[SERVICE].paused():
                latency |= {name: self._sweep(name, throughput[name]) for name in (CACHED, PLAIN)}
        return {
            "throughput_per_s": throughput,
            "ratios": ratios,
            "sustained_per_s": {name: _sustained(rows) for name, rows in latency.items()},
            "light_load": light,
            "latency": latency,
            "bare_layout": str(layout),
            "bare_images_per_s": layouts,
            "largest_score_difference": difference,
            "idle_cores": idle_cores,
        }

    def _server(self, name: str) -> Server:
        folder = str(self._case.folder)
        log = _LOGS / f"serve_{self._case.name.replace('/', '_')}_{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._say(f"starting {name}, its log is {log}")
        if name == SERVICE:
            arguments = [f"model={folder}", "port={port}", *_settings(self._config)]
            return Server("the service", "serve", arguments, log, _START_TIMEOUT_S)
        # A process a core with one thread each: faster than one process with more threads or more requests at once.
        arguments = [folder, "--port", "{port}", "--workers", str(_num_cpus()), "--threads", "1"]
        if name == CACHED:
            arguments += ["--cached", "--warm-up", str(self._bodies)]
        return Server(name, "benchmarks.plain_server", arguments, log, _START_TIMEOUT_S)

    def _compare_answers(self) -> float:
        """Ask all the same, which warms their caches too. The largest difference of a score from the service's."""
        body = self._bodies.read_bytes().split(b"\n")[0]
        answers = {}
        for name, server in self._servers.items():
            request = urllib.request.Request(server.url, body, {"content-type": "application/json"})
            for _ in range(2 * _num_cpus()):
                with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as answer:
                    predictions = json.load(answer)["results"][0]["predictions"]
            answers[name] = {prediction["label"]: prediction["score"] for prediction in predictions}
        expected = answers.pop(SERVICE)
        if any(answer.keys() != expected.keys() for answer in answers.values()):
            raise RuntimeError(f"the servers do not name the same labels: {expected} {answers}")
        return max(abs(answer[label] - expected[label]) for answer in answers.values() for label in expected)

    def _idle_cores(self) -> dict[str, float]:
        """Cores that each server takes while nobody asks it, which is at the expense of the others' figures."""
        started = time.monotonic()
        before = {name: server.cpu_s() for name, server in self._servers.items()}
        time.sleep(self._case.window_s / 2)
        elapsed = time.monotonic() - started
        return {name: round((server.cpu_s() - before[name]) / elapsed, 3) for name, server in self._servers.items()}

    def _light_load(self, rate: float) -> dict[str, Any]:
        """What the service adds where nothing queues: its p50 less that of the same work in one process, in turn."""
        p50s: dict[str, list[float]] = defaultdict(list)
        for _ in range(self._config.repeats):
            p50s[SERVICE].append(self._p50_ms(SERVICE, rate))
            with self._servers[SERVICE].paused():
                stages = self._bare.request_ms(self._case.pictures, threads=1, count=30, rate=rate)
                p50s[BARE].append(statistics.median(stages["total"]))
                for name in (CACHED, PLAIN):
                    p50s[name].append(self._p50_ms(name, rate))
            self._say(f"p50 at {rate}/s, ms: {_last(p50s)}")
        overheads = [ours - bare for ours, bare in zip(p50s[SERVICE], p50s[BARE], strict=True)]
        return {
            "rate_per_s": rate,
            "p50_ms": {name: round(statistics.median(values), 2) for name, values in p50s.items()},
            "overhead_ms_p50": round(statistics.median(overheads), 2),
            "bare_stages_ms": {name: round(statistics.median(values), 2) for name, values in stages.items()},
            "service_stages_ms": self._stages(rate),
        }

    def _stages(self, rate: float) -> dict[str, float]:
        """Where a request's time goes, by the service's own word; what it does not know of is HTTP and HAProxy."""
        outcome = self._open_loop(self._servers[SERVICE], rate)
        stages: dict[str, list[float]] = defaultdict(list)
        for row in outcome.answered:
            total = 1e3 * (outcome.done_s[row] - outcome.sent_s[row])
            known = {name: float(duration) for name, duration in _STAGE.findall(outcome.timings[row])}
            for name, duration in {**known, "http": total - sum(known.values()), "total": total}.items():
                stages[name].append(duration)
        return {name: round(statistics.median(values), 2) for name, values in stages.items()}

    def _throughput(self, layout: Layout) -> tuple[dict[str, float], dict[str, float]]:
        """Answers a second, and the medians of the service's over each of the others'."""
        rounds: list[dict[str, float]] = []
        for index in range(self._config.repeats):
            rates: dict[str, float] = {}
            if index % 2 == 0:  # every other round the other way around: a drift within the rounds then cancels out
                rates[SERVICE] = self._saturate(SERVICE)
            with self._servers[SERVICE].paused():
                rates[BARE] = self._bare.images_per_s(layout, self._case.window_s / 2)
                rates[CACHED] = self._saturate(CACHED)
                if index % 2 == 0:  # its ratio is the largest and its windows take longest: it needs the fewest
                    rates[PLAIN] = self._saturate(PLAIN)
            if index % 2:
                rates[SERVICE] = self._saturate(SERVICE)
            rounds.append(rates)
            self._say(f"throughput, answers/s: { ({name: round(rate, 2) for name, rate in rates.items()}) }")
        throughput = {
            name: round(statistics.median(rates[name] for rates in rounds if name in rates), 3)
            for name in (SERVICE, BARE, CACHED, PLAIN)
        }
        ratios = {
            name: round(statistics.median(rates[SERVICE] / rates[name] for rates in rounds if name in rates), 3)
            for name in (BARE, CACHED, PLAIN)
        }
        return throughput, ratios

    def _p50_ms(self, name: str, rate: float) -> float:
        return percentile(self._open_loop(self._servers[name], rate).latencies_ms(), 50)

    def _saturate(self, name: str) -> float:
        load = Load(
            self._servers[name].url,
            str(self._bodies),
            self._case.window_s,
            concurrency=self._case.outstanding[name],
            timeout_s=_ANSWER_TIMEOUT_S,
        )
        outcome = send(load)
        if len(outcome.answered) < len(outcome.status):
            raise RuntimeError(f"{name} left requests unanswered while throughput was measured: {outcome.summary()}")
        return outcome.throughput(_WARM_UP_SHARE * load.duration_s)

    def _sweep(self, name: str, throughput: float) -> list[dict[str, Any]]:
        """Open-loop windows at rising rates."""
        rows = []
        for share in SHARES[name]:
            rate = share * throughput
            rows.append({"rate_per_s": round(rate, 3), **self._open_loop(self._servers[name], rate).summary()})
            self._say(f"{name} at {rate:.3g}/s: {rows[-1]}")
        return rows

    def _open_loop(self, server: Server, rate: float) -> Outcome:
        self._windows += 1
        long_enough_s = _FEWEST / rate
        load = Load(
            server.url,
            str(self._bodies),
            max(self._case.window_s, long_enough_s),
            rate,
            even=long_enough_s > self._case.window_s,  # so few are not left to chance
            seed=self._windows,
            timeout_s=_ANSWER_TIMEOUT_S / 2,
        )
        return send(load)

    def _say(self, text: str) -> None:
        print(f"{self._case.name}: {text}", file=sys.stderr, flush=True)


def _sustained(rows: list[dict[str, Any]]) -> float | None:
    """The highest rate that is kept up with; None where there is none."""
    kept = [
        row["rate_per_s"]
        for row in rows
        if row["answered"] >= 0.99 * row["requests"]
        and row["p99_ms"] <= MAX_P99_MS
        and row["growth_s_per_s"] <= MAX_GROWTH
    ]
    return max(kept, default=None)


def _settings(config: BenchmarkConfig) -> tuple[str, ...]:
    """The service's settings: a replica a core for the image tower, as the peers have a process a core."""
    replicas = _num_cpus()
    given: tuple[str, ...] = config.settings
    return (f"image_encoder.min_replicas={replicas}", f"image_encoder.max_replicas={replicas}", *given)


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def _last(columns: dict[str, list[float]]) -> dict[str, float]:
    return {name: round(values[-1], 2) for name, values in columns.items()}


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """A polite end takes the servers down too, as Ctrl-C does."""

    def leave(*_: object) -> NoReturn:
        sys.exit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
