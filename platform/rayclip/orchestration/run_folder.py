"""The folder of a run, runs/NAME: what it was started with, its checkpoints, its pictures, its summary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayclip.errors import UserError
from rayclip.training.checkpoint import read_metrics

_MAY_CHANGE = ("cluster", "checkpoint", "tracking", "evaluation")
"""Sections that do not change what the weights are; all else must be as it was when a run goes on."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the record it was started with."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Ray Train's storage: a folder a checkpoint, and its own list of those that are whole."""
        return self.path / "checkpoints"

    @property
    def pictures(self) -> Path:
        """Contact sheets of the last evaluation."""
        return self.path / "pictures"

    @property
    def quarantine(self) -> Path:
        """A line of JSON for each sample that could not be read."""
        return self.path / "quarantine.jsonl"

    @property
    def summary(self) -> Path:
        """What the job writes when the run has ended."""
        return self.path / "summary.json"

    def read_record(self) -> dict[str, Any] | None:
        """What `write_record` kept; None for a new run."""
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_record(self, config: dict[str, Any], mlflow_run_id: str) -> None:
        """Keep what the run was started with."""
        self.path.mkdir(parents=True, exist_ok=True)
        partial = self.path / "run.json.partial"
        partial.write_text(json.dumps({"mlflow_run_id": mlflow_run_id, "config": config}, indent=1))
        partial.replace(self.path / "run.json")

    def check_same(self, record: dict[str, Any], config: dict[str, Any]) -> None:
        """Raise UserError where a run of this name was started with other settings."""
        before, now = record["config"], config
        for section in before.keys() | now.keys():
            if section not in _MAY_CHANGE and before.get(section) != now.get(section):
                raise UserError(
                    f"'{self.path}' holds a run with {_difference(section, before.get(section), now.get(section))}: "
                    f"give this one another name, or remove the folder"
                )

    def evaluated_checkpoints(self) -> list[tuple[Path, dict[str, Any]]]:
        """Whole checkpoints with their metrics, oldest first."""
        folders = sorted(p.parent for p in self.checkpoints.glob("*/metrics.json"))
        return [(folder, read_metrics(folder)) for folder in folders]


def _difference(key: str, before: object, now: object) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k))
        return _difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"{key} = {before}, not {now}"
