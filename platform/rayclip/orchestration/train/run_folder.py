"""The folder of a run, NAME in `runs`: what it was started with, its checkpoints, its pictures, its summary."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rayclip.config import TrainConfig
from rayclip.config.base import Effect
from rayclip.config.fields import keys_with, without
from rayclip.config.loader import read_record
from rayclip.errors import UserError
from rayclip.io.files import write_json
from rayclip.io.paths import StoragePath
from rayclip.orchestration.cluster.ray_internals import CHECKPOINT_LIST, lists_pending_validation


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run, and the record it was started with."""

    path: StoragePath

    @property
    def checkpoints(self) -> StoragePath:
        """Ray Train's storage: a folder a checkpoint, and its own list of those that are whole."""
        return self.path / "checkpoints"

    @property
    def contact_sheets(self) -> StoragePath:
        """Contact sheets of the last evaluation."""
        return self.path / "pictures"

    @property
    def quarantine(self) -> StoragePath:
        """A line of JSON for each sample that could not be read."""
        return self.path / "quarantine.jsonl"

    @property
    def summary(self) -> StoragePath:
        """What the run came to; a run that has one is complete."""
        return self.path / "summary.json"

    def read_record(self) -> dict[str, Any] | None:
        """What `write_record` kept; None for a new run."""
        return _read(self.path / "run.json")

    def write_record(
        self, config: dict[str, Any], mlflow_run_id: str, data: Sequence[Any] = (), generation: int = 1
    ) -> None:
        """Keep what the run was started with: its settings, the parts of its data, and which start of it this is."""
        record = {"mlflow_run_id": mlflow_run_id, "generation": generation, "config": config, "data": data}
        write_json(self.path / "run.json", record)

    def read_summary(self) -> dict[str, Any] | None:
        """What `write_summary` kept; None for a run that has not ended."""
        return _read(self.summary)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Keep what the run came to; from then on it is complete."""
        write_json(self.summary, summary)

    def check_same(self, record: dict[str, Any], config: dict[str, Any]) -> None:
        """Raise UserError where a run of this name was started with other settings that decide what its weights are."""
        may_change = keys_with(TrainConfig, Effect.SAME_RESULT)
        before, now = without(with_defaults(record["config"]), may_change), without(config, may_change)
        for section in sorted(before.keys() | now.keys()):
            if not same(before.get(section), now.get(section)):
                raise UserError(
                    f"'{self.path}' holds a run with {difference(section, before.get(section), now.get(section))}: "
                    f"give this one another name, or remove the folder"
                )

    def has_checkpoints(self) -> bool:
        """Whether the run has trained so far that it goes on from a checkpoint."""
        return self._list.exists()

    def back_up_list(self) -> None:
        """Copy Ray Train's list of whole checkpoints, which it writes over in place."""
        listed = self._read_list()
        if listed is not None:
            write_json(self._list_copy, listed)

    def repair_list(self) -> None:
        """Put the copy in place of a list that a crash cut off; the checkpoint it lacks is trained to once more."""
        if self._list.exists() and self._read_list() is None and self._list_copy.exists():
            write_json(self._list, json.loads(self._list_copy.read_text()))

    def has_pending_validation(self) -> bool:
        """Whether checkpoints are still to be measured that an earlier start of the run has saved."""
        listed = self._read_list()
        return listed is not None and lists_pending_validation(listed)

    def _read_list(self) -> dict[str, Any] | None:
        return _read(self._list, (OSError, ValueError))

    @property
    def _list(self) -> StoragePath:
        return self.checkpoints / CHECKPOINT_LIST

    @property
    def _list_copy(self) -> StoragePath:
        return self.path / "checkpoints.json"

    def evaluated_checkpoints(self) -> list[tuple[StoragePath, dict[str, Any]]]:
        """Whole checkpoints with their metrics, oldest first. A crash may leave others, half written."""
        # Ray and torch: what a run's record says is read before they are imported.
        from rayclip.orchestration.cluster.ray_storage import train_result
        from rayclip.training.checkpoint import read_metrics

        listed = train_result(self.checkpoints).best_checkpoints or []
        folders = [self.checkpoints / name for name in sorted(PurePath(found.path).name for found, _ in listed)]
        return [(folder, read_metrics(folder)) for folder in folders]


def _read(path: StoragePath, errors: tuple[type[Exception], ...] = (FileNotFoundError,)) -> dict[str, Any] | None:
    """A file's content; None where reading it raises one of the errors."""
    try:
        return json.loads(path.read_text())
    except errors:
        return None


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run of an older version had, by today's names, with the keys that have been added since."""
    try:
        return read_record(TrainConfig, config, "the run's record").model_dump(mode="json")
    except UserError:
        return config


def same(before: object, now: object) -> bool:
    """Equal, where a key that one of them does not have yet is one without a value."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(same(before.get(key), now.get(key)) for key in before.keys() | now.keys())
    return before == now


def difference(key: str, before: object, now: object) -> str:
    """The first of the settings under `key` that differs, as KEY = BEFORE, not NOW."""
    if isinstance(before, dict) and isinstance(now, dict):
        inner = next(k for k in sorted(before.keys() | now.keys()) if not same(before.get(k), now.get(k)))
        return difference(f"{key}.{inner}", before.get(inner), now.get(inner))
    return f"{key} = {before}, not {now}"
