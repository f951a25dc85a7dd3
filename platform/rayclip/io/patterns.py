"""Paths that name several files: {00000..00099}.tar, {a,b}.csv, *.tar, and folders of that kind."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from braceexpand import braceexpand

from rayclip.errors import UserError
from rayclip.io.read_only import is_web
from rayclip.io.s3 import File

_WILD = "*?["


def is_pattern(path: str) -> bool:
    """Whether a path names several files. In an address on a web server a question mark begins a query."""
    return any(character in path for character in ("*{[" if is_web(path) else "*{[?"))


def is_wild(pattern: str) -> bool:
    """Whether only a listing tells which files a name without braces stands for."""
    return any(character in pattern for character in _WILD)


def split_pattern(path: str) -> tuple[str, list[str]]:
    """(folder, patterns of names within it): "s3://b/p/{0..1}.tar" is "s3://b/p" with "0.tar" and "1.tar".

    Raises UserError where braces are not closed.
    """
    if path.count("{") != path.count("}"):
        raise UserError(f"'{path}': a brace is not closed; several files are {{00000..00099}}.tar or {{a,b}}.tar")
    parts = path.split("/")
    plain = list(takewhile(lambda part: not is_pattern(part), parts))
    return "/".join(plain) or "/", list(braceexpand("/".join(parts[len(plain) :])))


def select(files: Sequence[File], patterns: Sequence[str], path: str) -> list[File]:
    """The files that the patterns name, in the order of `files`. Raises UserError for a named one that is not there."""
    names = {file.name for file in files}
    plain = [pattern for pattern in patterns if not is_wild(pattern)]
    missing = [name for name in plain if name not in names]
    if missing:
        more = f", nor are {len(missing) - 1:,} others of it" if len(missing) > 1 else ""
        raise UserError(f"'{path}': '{missing[0]}' is not there{more}")
    wild = [pattern.split("/") for pattern in patterns if pattern not in set(plain)]
    exact = set(plain)
    return [file for file in files if file.name in exact or any(is_like(file.name, pattern) for pattern in wild)]


def is_like(name: str, pattern: Sequence[str]) -> bool:
    """Return whether a name is like a pattern's parts, part by part: * does not reach into folders."""
    parts = name.split("/")
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))
