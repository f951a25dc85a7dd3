"""Files that get their names only when all of them is there: a crash leaves the old one, or none."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; it takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two attempts at one task may overlap when a worker is lost: each writes to a file of its own.
    partial = path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as target:
            yield target
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text, whole and then named."""
    with whole_file(path) as target:
        target.write(text.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole and then named."""
    write_text(path, json.dumps(content, indent=2) + "\n")


SETTINGS_BESIDE = {
    "model.safetensors": "config.json",
    "open_clip_model.safetensors": "open_clip_config.json",
    "pytorch_model.bin": "config.json",
    "open_clip_pytorch_model.bin": "open_clip_config.json",
}
"""Names of files with weights, the preferred first, and of the file beside them that says what model they are of."""


def find_weights(path: Path) -> Path | None:
    """The file with weights that a path names: itself, or the first that the folder holds; None where there is none."""
    if path.is_file():
        return path
    return next((path / name for name in SETTINGS_BESIDE if (path / name).is_file()), None)
