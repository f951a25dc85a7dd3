"""Which files a data set that someone else wrote is made of, and how they are read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from rayclip.config import IndexConfig
from rayclip.data.formats import Layout, Shard, jsonl, parquet, table
from rayclip.data.formats.base import is_litter
from rayclip.data.formats.folder import IMAGES, LISTING, is_image, make_listing, read_listing
from rayclip.data.manifest import FILE_NAME, PARTIAL, Manifest
from rayclip.data.sources.table import CAPTION_COLUMNS, IMAGE_COLUMNS, find_column, same_column
from rayclip.errors import UserError
from rayclip.io.lease import FILE_NAMES
from rayclip.io.patterns import is_pattern, is_wild, select, split_pattern
from rayclip.io.read_only import check_writable, is_web
from rayclip.io.s3 import File
from rayclip.io.storage import (
    absolute,
    find_file,
    find_files,
    is_remote,
    join,
    list_files,
    read_bytes,
    split,
    write_bytes,
)

_EXTENSIONS = {
    "tar": (".tar",),
    "parquet": (".parquet",),
    "table": (".csv", ".tsv"),
    "jsonl": ("metadata.jsonl",),
    "folder": IMAGES,
}
"""How the names of files of each format end; of JSON Lines only Hugging Face's, since many files are such."""

CLASS_NAMES = "classnames.txt"
_WITH_COLUMNS = ("parquet", "table", "jsonl")
_OURS = (FILE_NAME, PARTIAL, LISTING, "index.json", CLASS_NAMES)
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", *IMAGE_COLUMNS)
_CAPTION_COLUMNS = ("caption", "captions", *CAPTION_COLUMNS, "txt")
_NUM_NAMED = 3
_MOST_ASKED = 1000  # pictures of a listing, whether they are there


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
    passed_over: dict[str, int] = field(default_factory=dict)
    """How many files are no part of it, by how their names end."""
    num_ignored: int = 0
    """Files that macOS or Windows left."""
    notes: tuple[str, ...] = ()

    def path(self, shard: File) -> str:
        """The path or address of a shard."""
        return join(self.root or self.folder, shard.name)


@dataclass
class _Files:
    """What lies where a config looks. `chosen` are those that its path names; None where it names the folder."""

    root: str
    there: list[File]
    chosen: list[File] | None = None

    @property
    def own(self) -> list[File]:
        """Those that may be the data set's."""
        files = self.there if self.chosen is None else self.chosen
        return [file for file in files if file.size and not is_litter(file.name) and not _is_ours(file.name)]


def make_plan(config: IndexConfig) -> IndexPlan:
    """Find the shards, in the order of their names, which becomes the data set's.

    Raises UserError for none, and where the manifest of others would be written over.
    """
    files = _look(config)
    kind, shards, layout, notes = _detect(config, files)
    folder = output_folder(config)
    root = "" if folder == files.root else files.root
    if not config.replace:
        _keep_others(folder, kind, shards, files, config)
    more = {**_left_out(files, kind, shards), "notes": (*notes, *_say_empty(files))}
    if kind == "folder":
        return _plan_folder(folder, files, shards, more, config)
    return IndexPlan(folder, root, layout, shards, **more)


def output_folder(config: IndexConfig) -> str:
    """Return the folder that the manifest is written to. Raises UserError where it cannot be written to."""
    path = absolute(config.path)
    if not config.output:
        check_writable(path, "give output=FOLDER, where the manifest goes")
    if config.output:
        return absolute(config.output)
    if is_pattern(path):
        return split_pattern(path)[0]
    return split(path)[0] if find_file(path) else path


def find_columns(columns: Sequence[str], kind: str) -> str | None:
    """The column of pictures among these, by the usual names; None where there is none."""
    usual = _usual_image_columns(kind)
    return next((column for name in usual if (column := same_column(name, columns))), None)


def _list(folder: str) -> list[File]:
    """The files below a folder, without those by which a process holds it."""
    return [file for file in list_files(folder) if not file.name.startswith(FILE_NAMES)]


def _find_named(folder: str, names: Sequence[str]) -> list[File]:
    """Those of the named files that are there, where the folder may not be listed."""
    found = find_files([join(folder, name) for name in names])
    return sorted(file._replace(name=name) for name, file in zip(names, found, strict=True) if file is not None)


def _look(config: IndexConfig) -> _Files:
    path = absolute(config.path)
    if is_pattern(path):
        root, patterns = split_pattern(path)
        there = _list(root) if any(map(is_wild, patterns)) or not is_web(root) else _find_named(root, patterns)
        return _Files(root, there, select(there, patterns, config.path))
    found = find_file(path)
    if found is None:
        return _Files(path, _list(path))
    folder, name = split(path)
    return _Files(folder, [], [File(name, found.size, found.stamp)])


def _detect(config: IndexConfig, files: _Files) -> tuple[str, list[File], Layout, list[str]]:
    """The first format that there are files of, at the top or else further down; notes on those passed over for it."""
    kinds: dict[str, tuple[str, ...]] = (
        _EXTENSIONS if config.format == "auto" else {config.format: _EXTENSIONS[config.format]}
    )
    if files.chosen is not None or config.format == "jsonl":
        kinds = {kind: (".jsonl",) if kind == "jsonl" else extensions for kind, extensions in kinds.items()}
    own, refused = files.own, dict[str, UserError]()
    for there in ([file for file in own if "/" not in file.name], own):
        for kind, extensions in kinds.items():
            shards = [file for file in there if file.name.lower().endswith(extensions)]
            # Pictures belong together wherever they lie.
            if not shards or (kind == "folder" and there is not own and config.format != "folder"):
                continue
            try:
                layout = _find_layout(kind, shards, files.root, config)
            except UserError as error:
                if len(kinds) == 1 or files.chosen is not None or config.image_column or config.caption_columns:
                    raise
                refused.setdefault(kind, error)
                continue
            return kind, shards, layout, [f"passed over: {error}" for error in refused.values()]
    raise next(iter(refused.values()), None) or _nothing_there(config, files, kinds)


def _nothing_there(config: IndexConfig, files: _Files, kinds: dict[str, tuple[str, ...]]) -> UserError:
    if not files.there and files.chosen is None and not is_remote(config.path):
        return UserError(f"'{config.path}' is not a folder with files in it")
    empty = ", and what there is is empty" if any(not file.size for file in files.there) and not files.own else ""
    wanted = ", ".join(f"*{extension}" for extensions in kinds.values() for extension in extensions)
    return UserError(f"'{config.path}' has no shards ({wanted}){empty}")


def _find_layout(kind: str, shards: Sequence[File], root: str, config: IndexConfig) -> Layout:
    """How the shards are read, from the first of them that has the columns. Raises the UserError of the first."""
    if kind not in _WITH_COLUMNS:
        return Layout(kind) if kind == "folder" else Layout()
    first: UserError | None = None
    for file in shards:
        try:
            return _layout_of(kind, Shard(join(root, file.name), file.size), config)
        except UserError as error:
            first = first or error
    assert first
    raise first


def _layout_of(kind: str, shard: Shard, config: IndexConfig) -> Layout:
    try:
        if kind == "table":
            separator, columns = table.find_header(shard, lambda columns: bool(find_columns(columns, "table")))
        elif kind == "jsonl":
            separator, columns = "", jsonl.read_columns(shard)
        else:
            schema = parquet.read_schema(shard)
            separator, columns = "", list(schema.names)
    except OSError as error:
        raise UserError(f"'{shard.path}' cannot be read: {error.strerror}" if error.strerror else str(error)) from None
    image = find_column("image_column", config.image_column, _usual_image_columns(kind), columns, shard.path)
    if kind == "parquet" and not _may_be_image(schema.field(image).type):
        raise UserError(f"'{shard.path}': column '{image}' is {schema.field(image).type}, not bytes or paths")
    captions = [
        find_column("caption_columns", named, _CAPTION_COLUMNS, columns, shard.path)
        for named in config.caption_columns or (None,)
    ]
    if kind == "parquet":
        captions = [_check_caption(shard, schema, name) for name in captions]
    return Layout(kind, image, tuple(captions), separator)


def _usual_image_columns(kind: str) -> tuple[str, ...]:
    return _IMAGE_COLUMNS if kind == "parquet" else (*IMAGE_COLUMNS, *_IMAGE_COLUMNS)


def _may_be_image(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary)
    return parquet.is_text(kind) or any(test(kind) for test in tests) or pa.types.is_struct(kind)


def _check_caption(shard: Shard, schema: pa.Schema, name: str) -> str:
    """A column of captions, or the one field of text within it. Raises UserError where that is not clear."""
    outer, *inner = [name] if name in schema.names else name.split(".")
    kind = schema.field(outer).type
    for part in inner:
        fields = [kind.field(i).name for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
        if part not in fields:
            raise UserError(
                f"'{shard.path}': column '{outer}' has no field '{part}'; it has: {', '.join(fields) or 'none'}"
            )
        kind = kind.field(part).type
    if not pa.types.is_struct(kind):
        listed = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if not (_may_be_image(listed) or pa.types.is_null(listed)):
            raise UserError(f"'{shard.path}': column '{name}' is {kind}, not text")
        return name
    fields = [kind.field(i).name for i in range(kind.num_fields)]
    if set(fields) & {"text", "caption"}:
        return name
    texts = [field for field in fields if parquet.is_text(kind.field(field).type)]
    if len(texts) != 1:
        raise UserError(
            f"'{shard.path}': column '{name}' holds {', '.join(fields)}: "
            f"name one, as caption_columns=[{name}.{fields[0]}]"
        )
    return f"{name}.{texts[0]}"


def _plan_folder(
    folder: str, files: _Files, pictures: list[File], more: dict[str, Any], config: IndexConfig
) -> IndexPlan:
    """The listing is the one shard, and is written here."""
    beside = [file for file in files.there if not is_image(file.name) and not _is_ours(file.name)]
    listing, class_names = make_listing([*pictures, *beside])
    more["notes"] += _keep_class_names(folder, class_names, config)
    path = join(folder, LISTING)
    write_bytes(path, listing)
    found = find_file(path)
    assert found
    layout = Layout("folder", separator="\t", pictures="" if folder == files.root else files.root)
    return IndexPlan(folder, "", layout, [File(LISTING, *found[1:])], class_names, **more)


def _is_ours(name: str) -> bool:
    return PurePosixPath(name).name in _OURS


def _left_out(files: _Files, kind: str, shards: Sequence[File]) -> dict[str, Any]:
    """What of the files is no part of the data set."""
    everything = files.there if files.chosen is None else files.chosen
    used = {file.name for file in shards}
    if kind == "folder":
        used |= {f"{name.rpartition('.')[0]}.{ending}" for name in used for ending in ("txt", "json")}
    named = () if kind in ("tar", "folder") else IMAGES  # rows name pictures
    others = [
        file
        for file in everything
        if file.size and file.name not in used and not _is_ours(file.name) and not file.name.lower().endswith(named)
    ]
    litter = [file for file in others if is_litter(file.name)]
    endings = Counter(PurePosixPath(file.name).suffix or "no ending" for file in others if file not in litter)
    return {"passed_over": dict(endings.most_common()), "num_ignored": len(litter)}


def _say_empty(files: _Files) -> list[str]:
    everything = files.there if files.chosen is None else files.chosen
    endings = tuple(ending for endings in _EXTENSIONS.values() for ending in endings)
    empty = [file.name for file in everything if not file.size and file.name.lower().endswith(endings)]
    named = ", ".join(f"'{name}'" for name in empty[:_NUM_NAMED]) + ", ..." * (len(empty) > _NUM_NAMED)
    return [f"{len(empty):,} empty left out: {named}"] if empty else []


def _keep_class_names(folder: str, class_names: Sequence[str], config: IndexConfig) -> tuple[str, ...]:
    """Note that other names of classes, by which labels count, are replaced. Raises UserError where index has no part
    in those: somebody wrote them by hand."""
    path = join(folder, CLASS_NAMES)
    if not class_names or find_file(path) is None:
        return ()
    there = read_bytes(path).decode("utf-8", "replace").splitlines()
    if there == list(class_names):
        return ()
    differ = f"names {len(there):,} classes and the folders are {len(class_names):,}"
    if len(there) == len(class_names):
        changed = next(i for i, names in enumerate(zip(there, class_names, strict=True)) if names[0] != names[1])
        differ = f"calls class {changed} '{there[changed]}' and its folder is '{class_names[changed]}'"
    if not config.replace and find_file(join(folder, FILE_NAME)) is None:
        raise UserError(f"'{path}' {differ}: move it elsewhere, or give replace=true to write over it")
    return (f"'{path}' is replaced: it {differ}",)


def _keep_others(folder: str, kind: str, shards: Sequence[File], files: _Files, config: IndexConfig) -> None:
    """Raise UserError where the folder's manifest is of files that are still there and that the new one leaves out."""
    try:
        last = Manifest.load(folder)
    except UserError:  # none, or none that could be used
        return
    root, new = last.root or folder, {join(files.root, file.name) for file in shards}
    if kind == "folder":
        listing, pictures = join(folder, LISTING), last.layout.pictures or folder
        names = read_listing(read_bytes(listing)) if find_file(listing) else []
        lost = [name for name in names if join(pictures, name) not in new]
        _refuse_to_lose(lost[:_MOST_ASKED], pictures, "pictures", folder, config)
        new = {join(root, LISTING)}
    lost = [name for name in last.shards if join(root, name) not in new]
    _refuse_to_lose(lost, root, f"{last.total_samples:,} samples", folder, config)


def _refuse_to_lose(names: Sequence[str], root: str, held: str, folder: str, config: IndexConfig) -> None:
    """Raise UserError where one of the files is there."""
    found = zip(names, find_files([join(root, name) for name in names]), strict=True)
    there = [name for name, file in found if file]
    if there:
        raise UserError(
            f"'{join(folder, FILE_NAME)}' is of {held} in '{there[0]}'{' and others' * (len(there) > 1)}, "
            f"which '{config.path}' leaves out: give output=FOLDER for one of its own, or replace=true to write over it"
        )
