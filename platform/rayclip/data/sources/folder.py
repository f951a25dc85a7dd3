"""Source `folder`: pictures with a caption beside each, `cat.jpg` with `cat.txt` or `cat.json`."""

import json
import os
from hashlib import blake2b
from pathlib import Path

from rayclip.config import FolderConfig
from rayclip.data.decode import BadSampleError
from rayclip.data.formats.base import is_litter
from rayclip.data.formats.folder import IMAGES
from rayclip.data.sources.base import Record, Split, hold_out
from rayclip.errors import UserError


def splits(config: FolderConfig, cache: Path) -> dict[str, Split]:
    """Every picture below the folder, by path. Raises UserError for no folder, or none with pictures."""
    root = Path(config.path).resolve()
    if not root.is_dir():
        raise UserError(f"source.path '{config.path}' is not a folder")
    found = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    paths = sorted(str(path) for path in found if path.suffix.lower() in IMAGES and not is_litter(path.name))
    if not paths:
        raise UserError(f"source.path '{config.path}' has no pictures ({', '.join(IMAGES)})")
    return hold_out(paths, [os.path.relpath(path, root) for path in paths], config.held_out_share)


def read(item: str, config: FolderConfig) -> Record:
    """One picture's bytes and its caption. Raises BadSampleError."""
    path = Path(item)
    caption = _caption(path, config.caption_key)
    return Record(read_image(path), caption)


def stamp(item: str) -> tuple[int, str]:
    """What tells that a picture or its caption has changed."""
    beside = _beside(Path(item))
    caption = beside.read_bytes() if beside else b""
    return file_size(item), blake2b(caption, digest_size=16).hexdigest()


def file_size(path: str) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def read_image(path: Path) -> bytes:
    """A file's bytes. Raises BadSampleError where there is none to read."""
    try:
        return path.read_bytes()
    except OSError:
        raise BadSampleError("no_image") from None


def _beside(image: Path) -> Path | None:
    """The file with the picture's caption."""
    return next((p for p in (image.with_suffix(".txt"), image.with_suffix(".json")) if p.is_file()), None)


def _caption(image: Path, key: str) -> str:
    beside = _beside(image)
    if beside is None:
        raise BadSampleError("no_caption")
    try:
        text = beside.read_text(encoding="utf-8")
        if beside.suffix == ".txt":
            return text
        return json.loads(text)[key] or ""
    except UnicodeDecodeError:
        raise BadSampleError("caption_not_utf8") from None
    except (ValueError, KeyError, TypeError):
        raise BadSampleError("no_caption") from None
