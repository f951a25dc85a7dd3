"""What it costs never to lose the place in hundreds of millions of pairs: bytes of a checkpoint, seconds of a restart.

The data set is a manifest alone, of chunks of 64 pairs in shards of 10,000. The ledger is as bad as it becomes: in the
middle of an epoch, and beyond its cursor 1,024 workers have a window of eight chunks each, of whose samples half are
done, at random. The peer is the plain way to remember samples: a bit for each one of the epoch.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.config import BenchmarkConfig
from benchmarks.memory import extra_bytes
from rayclip.config import ModelConfig, OptimizerConfig, TextConfig, VisionConfig
from rayclip.data.decode import CAUSES
from rayclip.data.ledger import Ledger
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.models.clip import CLIP
from rayclip.training.checkpoint import RunState, read_state, write_checkpoint
from rayclip.training.optimizer import build_optimizer

_CHUNK, _SHARD = 64, 10_000
_EPOCHS = 32
_WORKERS, _WINDOW = 1_024, 8
_MODEL = ModelConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=16, patch_size=8, width=16, layers=1, heads=2),
    text=TextConfig(context_length=16, width=16, layers=1, heads=2),
)
"""Its weights lie beside what is measured."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Bytes of the checkpoint's state, seconds and memory of what every process of a restart does with it."""
    with tempfile.TemporaryDirectory() as scratch:
        manifest = _manifest(scratch, config.pairs)
        manifest_bytes = Path(manifest.save()).stat().st_size
        spec = _spec(manifest)
        mark_s, state = _interrupted(spec)
        checkpoint = Path(scratch) / "checkpoint"
        model = CLIP(_MODEL)
        write_checkpoint(checkpoint, model, build_optimizer(model, OptimizerConfig()), state, {}, {})
        restarts = [_in_fresh_process(_restart, checkpoint, spec) for _ in range(config.repeats)]
        memory = extra_bytes(_prepare, checkpoint, spec)
        state_bytes = (checkpoint / "state.json").stat().st_size
    seconds = {key: round(statistics.median(restart[key] for restart in restarts), 3) for key in restarts[0]}
    return {
        "pairs": manifest.total_samples,
        "chunks": len(manifest),
        "manifest_mb": round(manifest_bytes / 1e6, 1),
        "chunks_half_done": _WORKERS * _WINDOW,
        "state_bytes": state_bytes,
        "ratio_vs_bit_a_sample": round(state_bytes / (manifest.total_samples / 8), 6),
        **seconds,
        "restart_s": round(sum(seconds.values()), 3),
        "restart_memory_mb": round(memory / 1e6),
        "memory_bytes_a_chunk": round(memory / len(manifest), 1),
        "mark_million_samples_s": round(mark_s, 3),
    }


def _manifest(folder: str, pairs: int) -> Manifest:
    num_samples = np.full(-(-pairs // _CHUNK), _CHUNK, dtype=np.int32)
    num_samples[-1] = pairs - _CHUNK * (len(num_samples) - 1)
    shard = (np.arange(len(num_samples)) * _CHUNK // _SHARD).astype(np.int32)
    length = np.random.default_rng(0).integers(1_000, 5_000, len(shard)) * 512
    end = length.cumsum()
    starts = np.flatnonzero(np.diff(shard, prepend=-1))  # each shard's first chunk
    offset = end - length - (end - length)[starts][shard]
    sizes = tuple(np.add.reduceat(length, starts).tolist())
    names = tuple(f"{i:06}.tar" for i in range(len(starts)))
    return Manifest(folder, names, sizes, shard, offset, length, num_samples)


def _spec(manifest: Manifest) -> StreamSpec:
    return StreamSpec(
        folder=manifest.folder, digest=manifest.digest, seed=0, end=_EPOCHS * len(manifest), window=_WINDOW,
        image_size=16, context_length=16, crop_scale=(0.9, 1.0), crop_ratio=(3 / 4, 4 / 3),
    )  # fmt: skip


def _interrupted(spec: StreamSpec) -> tuple[float, RunState]:
    """(seconds to mark a million samples as done, the state of a run in the middle of an epoch)."""
    stream = Stream(spec)
    cursor = spec.end // _EPOCHS * (_EPOCHS // 2) + len(stream.manifest) // 2
    ledger = Ledger(stream.rows_at, cursor)
    positions = np.arange(cursor, cursor + _WORKERS * _WINDOW)
    counts = stream.manifest.num_samples[stream.order.chunks(positions)]
    position = np.repeat(positions, counts)
    row = np.concatenate([np.arange(count) for count in counts.tolist()])
    done = np.random.default_rng(0).permutation(len(row))[: len(row) // 2]
    started = time.perf_counter()
    ledger.add(position[done], row[done])
    mark_s = (time.perf_counter() - started) / len(done) * 1e6
    given = stream.samples_before(cursor) + len(done)
    skipped = dict.fromkeys(CAUSES[1:], given // 10_000)
    seen = given - sum(skipped.values())
    return mark_s, RunState(seen, seen // 32_768, skipped=skipped, ledger=ledger.to_dict(), manifest_digest=spec.digest)


def _restart(checkpoint: Path, spec: StreamSpec) -> dict[str, float]:
    """Seconds of each thing that is done before the first sample of what is left can be read."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    state = timed("read_state_s", lambda: read_state(checkpoint))
    stream = Stream(spec, state.ledger)
    cursor = timed("read_ledger_s", lambda: stream.ledger().cursor)
    timed("read_manifest_s", lambda: stream.manifest)
    timed("order_of_epoch_s", lambda: stream.order.chunks(np.array([cursor])))
    num_remaining = timed("count_remaining_s", stream.num_remaining)
    rows = timed("half_done_windows_s", lambda: _half_done(stream))
    assert stream.samples_before(spec.end) - num_remaining == state.samples_consumed
    assert sum(map(len, rows)) > 0
    return seconds


def _half_done(stream: Stream) -> list[np.ndarray]:
    """What is left of each chunk of the windows that are half done."""
    ledger, first = stream.ledger(), stream.windows().start
    windows = (stream.order.positions(window, stream.spec.end) for window in range(first, first + _WORKERS))
    return [ledger.remaining_rows(position) for window in windows for position in window.tolist()]


def _prepare(checkpoint: Path, spec: StreamSpec) -> Callable[[], object]:
    return partial(_restart, checkpoint, spec)


def _in_fresh_process(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """A process that has read nothing yet, with as many threads as this one."""
    with get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(work, arguments)
