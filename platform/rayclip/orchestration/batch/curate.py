"""Curation of a data set in three steps, of which the first and the last are spread over the cluster:

looked/part-*.parquet    the statistics of every sample (`curation.sample_stats`), whatever the rules say
outcomes.npy             what becomes of every sample, an index into OUTCOMES (`curation.decide`), in one process
*.tar                    the samples of a part that stay, with all their files, as a shard
outcomes/part-*.parquet  the outcome of each of a part's samples: nothing is dropped in silence

The new data set's manifest and the summary come last. A run that is started again makes what is missing.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayclip.config import CurateConfig
from rayclip.config.base import Effect
from rayclip.config.fields import keys_with, without
from rayclip.data.curation.decide import OUTCOMES, Decision, decide
from rayclip.data.curation.report import write_queries, write_query_plot
from rayclip.data.curation.sample_stats import SampleStats, sample_stats, to_table
from rayclip.data.formats import Layout, Sample, Shard
from rayclip.data.formats.tar import write_shard
from rayclip.data.index import index_shard
from rayclip.data.manifest import Manifest
from rayclip.errors import UserError
from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath, size_of, storage_path, to_read
from rayclip.io.storage import absolute, join, read_bytes
from rayclip.orchestration.batch.output_jobs import complete_output, run_parts
from rayclip.orchestration.batch.partitioned_output import Part, PartitionedOutput, open_complete, plan_parts
from rayclip.orchestration.batch.sample_reader import SamplePlace, SampleReader

_STATS = "looked"
_OUTCOMES = "outcomes.npy"


def curate(config: CurateConfig) -> dict[str, Any]:
    """Write the data set of the pairs that stay, or the rest of it; a complete one is only reported.

    Returns the summary. Raises UserError for an output that holds something else, and for all that cannot be read.
    """
    data, path = absolute(config.data), storage_path(config.output)
    manifest = Manifest.load(data)
    manifest.check_shards()
    identity: dict[str, Any] = {
        "kind": "curate", "format": 1, "source": data, "source_digest": manifest.digest,
        "part_samples": config.part_samples,
    }  # fmt: skip
    # "scores" is what outputs of earlier releases call the digest of the embeddings.
    settings = without(config.model_dump(mode="json"), keys_with(CurateConfig, Effect.SAME_RESULT, Effect.BY_CONTENT))
    settings |= {
        "queries": _content(config.queries),
        "scores": _content(config.embeddings and join(config.embeddings, "embed.json")),
    }
    # It has no parts of its own: it is complete once its summary is there.
    output = PartitionedOutput(path, identity | {"settings": settings}, 0)
    return complete_output(output, config.cluster, lambda: _write(config, manifest, identity, output))


def _write(
    config: CurateConfig, manifest: Manifest, identity: dict[str, Any], output: PartitionedOutput
) -> dict[str, Any]:
    parts = plan_parts(manifest, config.part_samples)
    data = identity["source"], manifest.digest
    score_N = read_scores(storage_path(config.embeddings), manifest) if config.embeddings else None
    stats = PartitionedOutput(output.path / _STATS, identity, len(parts))
    make_stats = partial(SampleStatsReader, *data, config.part_samples)
    run_parts(stats, make_stats, config.cluster, manifest.total_samples, config.max_bad_fraction)
    seen = pa.concat_tables(pq.read_table(to_read(stats.file(part))) for part in range(len(parts)))
    decision = decide(seen, config, score_N)
    if not (decision.outcome_N == 0).any():
        raise UserError(f"no pair of '{identity['source']}' stays: {decision.counts()}")
    with whole_file(output.path / _OUTCOMES) as target:
        np.save(target, decision.outcome_N)
    write_queries(output.path / "queries.parquet", decision)
    write_query_plot(output.path / "queries.png", decision, config.pairs_per_query)

    written = PartitionedOutput(output.path / "outcomes", output.identity, len(parts))
    make_writer = partial(ShardWriter, *data, config, str(output.path))
    run_parts(written, make_writer, config.cluster, manifest.total_samples, max_bad_fraction=1.0)
    summary = {"output": str(output.path), "source": identity["source"], "samples": manifest.total_samples}
    return output.finish(summary | _result_counts(decision, _index(output.path, len(parts), config.chunk_samples)))


class SampleStatsReader:
    """Computes the statistics of a part's samples."""

    def __init__(self, folder: str, digest: str, part_samples: int) -> None:
        self._reader = SampleReader(folder, digest, part_samples)

    def __call__(self, part: int) -> Part:
        """Return the part as a table of `sample_stats.SCHEMA`."""
        places, stats = zip(*self._reader.map(part, _place_and_stats), strict=True)
        causes = Counter(seen.cause for seen in stats if seen.cause)
        rows = {"samples": len(stats), "bad": causes.total()}
        return Part(to_table(places, stats), {"rows": rows, "causes": dict(causes)})


def _place_and_stats(place: SamplePlace, sample: Sample | str) -> tuple[tuple[str, int, int], SampleStats]:
    stats = SampleStats(sample) if isinstance(sample, str) else sample_stats(sample)
    return (place.id, place.chunk, place.row), stats


class ShardWriter:
    """Writes the samples of a part that stay."""

    def __init__(self, folder: str, digest: str, config: CurateConfig, output: str) -> None:
        self._reader = SampleReader(folder, digest, config.part_samples)
        self._chunk_samples, self._output = config.chunk_samples, storage_path(output)
        self._outcome_N = _load(self._output / _OUTCOMES)

    def __call__(self, part: int) -> Part:
        """Write the part's shard; return the outcome of every sample."""
        chunks = self._reader.parts[part]
        outcomes = self._outcome_N[self._reader.num_before(chunks.start) : self._reader.num_before(chunks.stop)]
        places: list[tuple[str, int, int]] = []

        def kept() -> Iterator[Sample]:
            samples = self._reader.map(part, lambda place, sample: (place, sample))
            for (place, sample), outcome in zip(samples, outcomes, strict=True):
                places.append((place.id, place.chunk, place.row))
                if outcome == 0:
                    assert isinstance(sample, dict)
                    # Two shards may use one key; a name of its own keeps neighbours apart.
                    yield sample | {"__key__": f"{place.chunk:09}{place.row:05}".encode()}

        with whole_file(shard_path(self._output, part)) as target:
            write_shard(target, kept(), self._chunk_samples)
        names = [OUTCOMES[outcome] for outcome in outcomes.tolist()]
        causes = Counter(names)
        kept_samples = causes.pop("kept", 0)
        columns = zip(*places, strict=True)
        table = pa.table([*map(list, columns), names], names=["id", "chunk", "row", "outcome"])
        rows = {"samples": len(names), "bad": 0, "kept": kept_samples}
        return Part(table, {"rows": rows, "causes": dict(causes)})


def read_scores(path: StoragePath, manifest: Manifest) -> np.ndarray:
    """Return the cosine of image and caption of every sample, float32 [N]; NaN where one is missing.

    Raises UserError for embeddings of another data set, or of one side alone.
    """
    folder, _ = open_complete(path, "embed")
    if folder.identity["source_digest"] != manifest.digest:
        raise UserError(f"embeddings '{path}' were made from another data set, '{folder.identity['source']}'")
    if folder.identity["what"] != "both":
        raise UserError(f"embeddings '{path}' holds {folder.identity['what']} only: run rayclip embed with what=both")
    score_N = np.full(manifest.total_samples, np.nan, dtype=np.float32)
    first = 0
    for part in range(folder.num_parts):
        table = pq.read_table(to_read(folder.file(part)), columns=["image_embedding", "text_embedding"])
        both = np.flatnonzero(
            table["image_embedding"].is_valid().to_numpy() & table["text_embedding"].is_valid().to_numpy()
        )
        image_ME, text_ME = (_vectors(table[name].take(both)) for name in table.column_names)
        score_N[first + both] = (image_ME * text_ME).sum(axis=1)
        first += len(table)
    return score_N


def shard_path(output: StoragePath, part: int) -> StoragePath:
    """Return where the samples of a part that stay go."""
    return output / f"{part:06}.tar"


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy().reshape(len(column), -1)


def _load(file: StoragePath) -> np.ndarray:
    return np.load(file, mmap_mode="r") if isinstance(file, Path) else np.load(to_read(file))


def _index(output: StoragePath, num_parts: int, chunk_samples: int) -> Manifest:
    """The new manifest, of the shards that hold anything."""
    shards = []
    for path in (shard_path(output, part) for part in range(num_parts)):
        size = size_of(path)
        chunks = index_shard(Shard(str(path), size), chunk_samples, Layout())
        if len(chunks):
            shards.append((path.name, size, chunks))
    manifest = Manifest.from_spans(str(output), shards)
    manifest.save()
    return manifest


def _result_counts(decision: Decision, new: Manifest) -> dict[str, Any]:
    return {
        "kept": new.total_samples,
        "outcomes": decision.counts(),
        "queries": len(decision.queries),
        "queries_found": int((decision.before_Q > 0).sum()),
        "most_pairs_of_a_query": {
            name: int(counts_Q.max(initial=0))
            for name, counts_Q in (("before", decision.before_Q), ("after", decision.after_Q))
        },
        "digest": new.digest,
    }


def _content(file: str | None) -> str | None:
    """The digest of a file. Raises UserError where there is none."""
    if file is None:
        return None
    try:
        return blake2b(read_bytes(file), digest_size=16).hexdigest()
    except OSError as error:
        raise UserError(f"'{file}' cannot be read: {error.strerror or error}") from None
