"""The layouts that people's data sets for evaluation have, as chunks of samples to read.

    FOLDER/classnames.txt                            a class a line, in order of its index
    FOLDER/zeroshot_classification_templates.txt     a template a line, "{c}" where the class name goes
    FOLDER/SPLIT/*.tar                               WebDataset shards: a picture, its .cls, .npy or .txt
    FOLDER/SPLIT/nshards.txt                         how many there are, where somebody says so
    FOLDER/SPLIT/CLASS/*.jpg                         or a folder a class, in the order of their names

This is how CLIP_benchmark's users have them; both texts may lie in SPLIT too, where rayclip ingest puts them. Nothing
is written there: what a folder lacks to be read in chunks (an index of its shards, or shards of its loose pictures)
goes to a cache.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rayclip.data.decode import IMAGE_EXTENSIONS
from rayclip.data.formats import Layout, Sample, Shard
from rayclip.data.formats.tar import write_shard
from rayclip.data.index import index_shard
from rayclip.data.manifest import FILE_NAME, Chunks, Manifest
from rayclip.errors import UserError, nearest
from rayclip.inference.prompts import PLACEHOLDER
from rayclip.io.files import whole_file
from rayclip.io.paths import StoragePath, matching, size_of
from rayclip.io.storage import find_files, join

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
_THEIR_PLACEHOLDER = "{c}"
_CHUNK_SAMPLES = 64
_SHARD_SAMPLES = 1024


def split_folder(folder: StoragePath, split: str) -> StoragePath:
    """Where a split lies. Raises UserError for one that is not there."""
    path = folder / split
    if not path.is_dir():
        there = [child.name for child in _children(folder) if child.is_dir()]
        raise UserError(f"'{folder}' has no split '{split}': {nearest(split, there) if there else 'it has no folders'}")
    return path


def read_class_names(folder: StoragePath, split: StoragePath) -> tuple[str, ...]:
    """The classes in order of their index: from classnames.txt, or else the names of the class folders.

    Raises UserError where there is neither, a name is empty, or there are more or fewer folders than names.
    """
    folders = class_folders(split)
    names = _lines(folder, split, CLASS_NAMES)
    if names is None and not folders:
        raise UserError(
            f"no '{CLASS_NAMES}' in '{folder}' or '{split}': zero-shot needs the classes' names, a line each"
        )
    if names is None:
        return tuple(path.name for path in folders)
    if folders and len(folders) != len(names):
        raise UserError(f"'{folder}': {CLASS_NAMES} names {len(names)} classes, '{split}' has {len(folders)} folders")
    for index, name in enumerate(names):
        if not name:
            raise UserError(f"'{folder}': class {index} has no name in {CLASS_NAMES}")
    return tuple(names)


def read_templates(folder: StoragePath, split: StoragePath) -> tuple[str, ...] | None:
    """The templates that lie with the data, with our placeholder; None where there are none.

    Raises UserError for a template without a placeholder.
    """
    lines = _lines(folder, split, TEMPLATES)
    if lines is None:
        return None
    for number, line in enumerate(lines, 1):
        if line and _THEIR_PLACEHOLDER not in line and PLACEHOLDER not in line:
            where = f"'{folder}': {TEMPLATES}, line {number}"
            raise UserError(f"{where}: '{line}' has no {_THEIR_PLACEHOLDER} where the class name goes")
    found = tuple(line.replace(_THEIR_PLACEHOLDER, PLACEHOLDER) for line in lines if line)
    if not found:
        raise UserError(f"'{folder}': {TEMPLATES} is empty: it needs a template a line, or it must not be there")
    return found


def open_split(split: StoragePath, cache: StoragePath) -> Manifest:
    """A split in chunks. Raises UserError where it has nothing to read, or shards are missing or cut off."""
    if (split / FILE_NAME).is_file():
        manifest = Manifest.load(str(split))
        manifest.check_shards()
        return manifest
    if any(split.glob("*.tar")):
        return _index(split, cache)
    if class_folders(split):
        return _pack(split, cache)
    extensions = ", ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
    raise UserError(f"'{split}' has neither tar shards (*.tar) nor a folder a class with pictures ({extensions})")


def class_folders(split: StoragePath) -> list[StoragePath]:
    """A folder a class, by name; none where the split is in shards."""
    return [] if any(split.glob("*.tar")) else [child for child in _children(split) if child.is_dir()]


def stamp(manifest: Manifest) -> str:
    """Tells data that changed, in place and at the same length too: by the shards' names, sizes, chunks and times."""
    found = find_files([join(manifest.root or manifest.folder, shard) for shard in manifest.shards])
    return hashlib.sha256(json.dumps([manifest.digest, [file and file.stamp for file in found]]).encode()).hexdigest()


def _children(folder: StoragePath) -> list[StoragePath]:
    return [folder / name for name in sorted(child.name for child in folder.iterdir())]


def _lines(folder: StoragePath, split: StoragePath, name: str) -> list[str] | None:
    path = next((place / name for place in (split, folder) if (place / name).is_file()), None)
    try:
        return None if path is None else [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"'{path}' is not UTF-8") from None


def _index(split: StoragePath, cache: StoragePath) -> Manifest:
    shards = [path for path in matching(split, "*.tar") if path.is_file()]
    count = split / "nshards.txt"
    said = count.read_text().strip() if count.is_file() else str(len(shards))
    if said != str(len(shards)):
        raise UserError(f"'{split}': {count.name} says {said} shards, {len(shards)} are there")

    def make(folder: StoragePath) -> list[tuple[str, int, Chunks]]:
        return [_index_shard(shard) for shard in shards]

    return _cached(split, cache / "indexes", shards, make)


def _index_shard(path: StoragePath) -> tuple[str, int, Chunks]:
    size = size_of(path)
    return str(path), size, index_shard(Shard(str(path), size), _CHUNK_SAMPLES, Layout())


def _pack(split: StoragePath, cache: StoragePath) -> Manifest:
    if not isinstance(split, Path):
        raise UserError(f"'{split}' holds loose pictures: in S3 they must be in shards; pack them with rayclip ingest")
    images = [(path, label) for label, folder in enumerate(class_folders(split)) for path in _images(folder)]

    def make(folder: StoragePath) -> list[tuple[str, int, Chunks]]:
        starts = range(0, len(images), _SHARD_SAMPLES)
        return [_write_shard(folder / f"{i:06}.tar", images[i : i + _SHARD_SAMPLES], split) for i in starts]

    return _cached(split, cache / "packed", [path for path, _ in images], make)


def _images(folder: StoragePath) -> list[Path]:
    """Raises UserError for a class without any."""
    assert isinstance(folder, Path)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS)
    if not found:
        raise UserError(f"class folder '{folder}' has no pictures: remove it, or put the class's pictures there")
    return found


def _write_shard(path: StoragePath, images: Sequence[tuple[Path, int]], split: Path) -> tuple[str, int, Chunks]:
    def samples() -> Iterator[Sample]:
        for image, label in images:
            # A dot would end the sample's key.
            key = str(image.relative_to(split).with_suffix("")).replace(".", "_")
            extension = image.suffix.lower().removeprefix(".")
            yield {"__key__": key.encode(), extension: image.read_bytes(), "cls": str(label).encode()}

    with whole_file(path) as target:
        spans = write_shard(target, samples(), _CHUNK_SAMPLES)
        return path.name, target.tell(), spans


def _cached(
    split: StoragePath,
    cache: StoragePath,
    files: Sequence[StoragePath],
    make: Callable[[StoragePath], list[tuple[str, int, Chunks]]],
) -> Manifest:
    """The manifest that the cache keeps for these files as they are now; made where it is not there."""
    state = find_files([str(file) for file in files])
    folder = cache / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]
    if not (folder / FILE_NAME).is_file():
        manifest = Manifest.from_spans(str(folder), make(folder))
        if not len(manifest):
            raise UserError(f"'{split}' is empty: its shards hold no samples")
        folder.mkdir(parents=True, exist_ok=True)
        manifest.save()
    return Manifest.load(str(folder))
