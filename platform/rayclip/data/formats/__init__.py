"""How data sets lie on disk and in S3: a module a format, all with the same two functions."""

from rayclip.data.formats import folder, jsonl, parquet, table, tar
from rayclip.data.formats.base import ChunkError, Format, Layout, Sample, Shard, Span

FORMATS: dict[str, Format] = {"tar": tar, "parquet": parquet, "table": table, "jsonl": jsonl, "folder": folder}
"""Formats by the `kind` of their layout."""

__all__ = ["FORMATS", "ChunkError", "Format", "Layout", "Sample", "Shard", "Span"]
