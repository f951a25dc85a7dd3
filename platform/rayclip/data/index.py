"""What a data set that someone else wrote is made of: its format, its shards, and the chunks of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rayclip.config import IndexConfig
from rayclip.data.formats import FORMATS, Layout, Shard, Span, parquet, table, tar
from rayclip.data.formats.folder import IMAGES, LISTING, make_listing
from rayclip.data.manifest import FILE_NAME, Chunks, Manifest
from rayclip.data.sources.table import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column
from rayclip.errors import UserError
from rayclip.io.s3 import File
from rayclip.io.storage import absolute, find_file, is_remote, join, list_files, split, write_bytes

PARTIAL = "manifest.partial.parquet"
"""What an index that was interrupted has found."""

_EXTENSIONS = {"tar": (".tar",), "parquet": (".parquet",), "table": (".csv", ".tsv"), "folder": IMAGES}
_OURS = (FILE_NAME, PARTIAL, LISTING)
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", *IMAGE_COLUMNS)
_CAPTION_COLUMNS = ("caption", "captions", *CAPTION_COLUMNS, "txt")


@dataclass(frozen=True)
class IndexPlan:
    """The shards of a data set and how they are read. Small and picklable but for the shards."""

    folder: str
    """Where the manifest goes."""
    root: str
    """Where the shards are; empty for `folder`."""
    layout: Layout
    shards: Sequence[File]
    class_names: Sequence[str] = ()

    def path(self, shard: File) -> str:
        """The path or address of a shard."""
        return join(self.root or self.folder, shard.name)


class Indexed(NamedTuple):
    """A shard that was read. `problem` says what is wrong with one that is not whole."""

    name: str
    size: int
    stamp: str
    chunks: np.ndarray
    problem: str | None = None


def make_plan(config: IndexConfig) -> IndexPlan:
    """Find the shards, in the order of their names, which becomes the data set's. Raises UserError for none."""
    root, one = _root(config)
    files = [one] if one else list_files(root)
    kind, shards = _detect(config, files)
    folder = output_folder(config)
    if kind == "folder":
        return _plan_folder(folder, root, shards, files)
    layout = _layout_of(kind, Shard(join(root, shards[0].name), shards[0].size), config)
    return IndexPlan(folder, "" if folder == root else root, layout, shards)


def output_folder(config: IndexConfig) -> str:
    """Where the manifest goes."""
    return absolute(config.output) if config.output else _root(config)[0]


def _root(config: IndexConfig) -> tuple[str, File | None]:
    """The folder, and the one file in it where that is what the path names."""
    path = absolute(config.path)
    found = find_file(path)
    if found is None:
        return path, None
    folder, name = split(path)
    return folder, File(name, found.size, found.stamp)


def _detect(config: IndexConfig, files: Sequence[File]) -> tuple[str, list[File]]:
    """The first format that there are files of: at the top, or else further down."""
    kinds = _EXTENSIONS if config.format == "auto" else {config.format: _EXTENSIONS[config.format]}
    own = [file for file in files if file.size and PurePosixPath(file.name).name not in _OURS]
    for there in ([file for file in own if "/" not in file.name], own):
        for kind, extensions in kinds.items():
            shards = [file for file in there if file.name.lower().endswith(extensions)]
            # Pictures belong together wherever they lie.
            if shards and (kind != "folder" or there is own or config.format == "folder"):
                return kind, shards
    if not files and not is_remote(config.path):
        raise UserError(f"'{config.path}' is not a folder with files in it")
    wanted = ", ".join(f"*{extension}" for extensions in kinds.values() for extension in extensions)
    raise UserError(f"'{config.path}' has no shards ({wanted})")


def _plan_folder(folder: str, root: str, pictures: list[File], files: Sequence[File]) -> IndexPlan:
    """The listing is the one shard, and is written here."""
    listing, class_names = make_listing([file for file in files if PurePosixPath(file.name).name not in _OURS])
    path = join(folder, LISTING)
    write_bytes(path, listing)
    found = find_file(path)
    assert found
    layout = Layout("folder", separator="\t", pictures="" if folder == root else root)
    return IndexPlan(folder, "", layout, [File(LISTING, *found[1:])], class_names)


def _layout_of(kind: str, first: Shard, config: IndexConfig) -> Layout:
    """How the shards are read, from the first of them."""
    if kind == "tar":
        return Layout()
    try:
        if kind == "table":
            separator, columns = table.read_header(first, "\t" if first.path.lower().endswith(".tsv") else "")
        else:
            schema = parquet.read_schema(first)
            separator, columns = "", list(schema.names)
    except OSError as error:
        raise UserError(_describe_error(first, error)) from None
    usual = _IMAGE_COLUMNS if kind == "parquet" else (*IMAGE_COLUMNS, *_IMAGE_COLUMNS)
    image = find_column("image_column", config.image_column, usual, columns, first.path)
    if kind == "parquet" and not _may_be_image(schema.field(image).type):
        raise UserError(f"'{first.path}': column '{image}' is {schema.field(image).type}, not bytes or paths")
    captions = [
        find_column("caption_columns", named, _CAPTION_COLUMNS, columns, first.path)
        for named in config.caption_columns or (None,)
    ]
    return Layout(kind, image, tuple(captions), separator)


def _may_be_image(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests) or pa.types.is_struct(kind)


def index_shard(shard: Shard, chunk_samples: int, layout: Layout, salvage: bool = False) -> tuple[Chunks, str | None]:
    """(chunks, what is wrong) of one shard. Raises UserError, naming the file, for one that is not whole.

    With `salvage` it gives the chunks that can be read of it.
    """
    try:
        if layout.kind == "tar" and salvage:
            return tar.list_whole_chunks(shard, chunk_samples)
        return FORMATS[layout.kind].list_chunks(shard, chunk_samples, layout), None
    except OSError as error:
        if salvage:
            return list[Span](), _describe_error(shard, error)
        raise UserError(_describe_error(shard, error)) from None


def _describe_error(shard: Shard, error: OSError) -> str:
    return f"'{shard.path}' cannot be read: {error.strerror}" if error.strerror else str(error)


def known_shards(plan: IndexPlan, notes: dict[str, object]) -> dict[str, Indexed]:
    """What the last index, complete or not, says of shards that have not changed since, by name."""
    known: dict[str, Indexed] = {}
    now = {file.name: file for file in plan.shards}
    for name in (FILE_NAME, PARTIAL):
        try:
            last = Manifest.load(plan.folder, name)
        except UserError:  # none, or none that could be used
            continue
        if last.layout == plan.layout and last.notes == notes and last.root == plan.root and last.stamps:
            known |= {found.name: found for found in _shards_of(last) if found[:3] == now.get(found.name)}
    return known


def _shards_of(manifest: Manifest) -> list[Indexed]:
    chunks = np.stack([manifest.offset, manifest.length, manifest.num_samples], axis=1).astype(np.int64)
    edges = np.searchsorted(manifest.shard, np.arange(len(manifest.shards) + 1))
    rows = zip(manifest.shards, manifest.shard_bytes, manifest.stamps, edges, edges[1:], strict=False)
    return [Indexed(name, size, stamp, chunks[a:b]) for name, size, stamp, a, b in rows]


def to_manifest(plan: IndexPlan, found: dict[str, Indexed], notes: dict[str, object]) -> Manifest:
    """The manifest of the shards that were found, in the plan's order."""
    chosen = [found[file.name] for file in plan.shards if file.name in found and len(found[file.name].chunks)]
    shards = [(shard.name, shard.size, shard.chunks) for shard in chosen]
    more = {"root": plan.root, "stamps": tuple(shard.stamp for shard in chosen), "notes": notes}
    return Manifest.from_spans(plan.folder, shards, plan.layout, **more)
