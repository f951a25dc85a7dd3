"""The runs that a law is fitted to, from a CSV. One that cannot be used stays in the list, with the reason."""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rayclip.errors import UserError
from rayclip.io.files import write_text
from rayclip.io.paths import StoragePath

COLUMNS = ("name", "gmacs", "samples", "error")
"""What a row must have. `dataset` and `unique_samples` it may have; whatever else there is, is left alone."""


@dataclass(frozen=True)
class Point:
    """What one run cost and gave: `gmacs` of one pair's forward pass, `samples` seen, `error` as a share."""

    gmacs: float
    samples: float
    error: float

    @property
    def compute(self) -> float:
        """Forward GMACs a pair times samples seen; training costs three times as much."""
        return self.gmacs * self.samples


@dataclass(frozen=True)
class Run:
    """A run of the source; `reason` says why it is not fitted, and is empty where it is.

    `unique_samples` are the different ones among the samples seen, None where the source does not say.
    """

    name: str
    point: Point | None
    reason: str = ""
    unique_samples: float | None = None


def make_run(name: str, figures: Mapping[str, object]) -> Run:
    """A run of its gmacs, samples, error and perhaps unique_samples, numbers or text; without a point where one of them
    cannot be.
    """
    try:
        gmacs, samples, error = (_positive(column, figures.get(column)) for column in COLUMNS[1:])
        if error > 1:
            raise ValueError(f"error {error:g} is above 1: it must be a share, not percent")
        known = figures.get("unique_samples") not in (None, "")
        unique = _positive("unique_samples", figures["unique_samples"]) if known else None
    except ValueError as reason:
        return Run(name, None, str(reason))
    return Run(name, Point(gmacs, samples, error), unique_samples=unique)


def read_csv(path: StoragePath, dataset: str | None = None) -> list[Run]:
    """The runs of a CSV; `dataset` takes only the rows whose column of that name says so.

    Raises UserError for a file that is missing, is no text, or lacks a column.
    """
    try:
        lines = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    except FileNotFoundError:
        raise UserError(f"there is no file '{path}'") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"'{path}' cannot be read as a CSV: {error}") from None
    header = [column.strip() for column in lines[0]] if lines else []
    missing = [column for column in (*COLUMNS, *(["dataset"] if dataset else [])) if column not in header]
    if missing:
        raise UserError(f"'{path}' has no column {', '.join(missing)}; it has: {', '.join(header) or 'none'}")
    numbered = [(number, line) for number, line in enumerate(lines[1:], 2) if any(cell.strip() for cell in line)]
    return _without_copies([_read_line(number, line, header, dataset) for number, line in numbered])


def write_csv(path: StoragePath, runs: Iterable[Run]) -> None:
    """All runs by their compute: which are fitted, and why the others are not."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*COLUMNS, "compute", "fitted", "reason"))
    for run in sorted(runs, key=lambda run: (run.point.compute if run.point else math.inf, run.name)):
        point = run.point
        figures = (point.gmacs, point.samples, point.error, point.compute) if point else ()
        written = [f"{value:.10g}" for value in figures] or [""] * 4
        writer.writerow((run.name, *written, "no" if run.reason else "yes", run.reason))
    write_text(path, file.getvalue())


def _read_line(number: int, line: list[str], header: list[str], dataset: str | None) -> Run:
    row = {column: cell.strip() for column, cell in zip(header, line, strict=False)}
    name = row.get("name") or f"line {number}"
    if len(line) != len(header):
        return Run(name, None, f"line {number} has {len(line)} cells where the header has {len(header)}")
    if dataset is not None and row["dataset"] != dataset:
        return Run(name, None, f"dataset is '{row['dataset']}', not '{dataset}'")
    return make_run(name, row)


def _without_copies(runs: list[Run]) -> list[Run]:
    """A row that is there twice is one run: counting it as two would make the law look surer than it is."""
    seen: set[Run] = set()
    kept = []
    for run in runs:
        copied = run.point is not None and run in seen
        kept.append(replace(run, point=None, reason="a copy of a row above") if copied else run)
        seen.add(run)
    return kept


def _positive(column: str, value: object) -> float:
    if value is None or value == "":
        raise ValueError(f"{column} is missing")
    try:
        number = float(str(value))
    except ValueError:
        raise ValueError(f"{column} '{value}' is no number") from None
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{column} is {number:g}: it must be a number above 0")
    return number
