"""Branches: runs that go on from another run's checkpoint, whole, with what that run would have seen next.

They have a folder, checkpoints and a length of their own. What a branch trains differently than its trunk is how: the
rate, above all. Which samples it meets, in which batches, and what learns from them stays as it was.
"""

from typing import Any

from rayclip.config import TrainConfig
from rayclip.config.base import Effect
from rayclip.config.fields import keys_with, without
from rayclip.data.stream import StreamSpec
from rayclip.errors import UserError
from rayclip.io.paths import StoragePath, storage_path
from rayclip.orchestration.train.run_folder import RunFolder, difference, same, with_defaults
from rayclip.orchestration.train.stream import latest_checkpoint
from rayclip.training.checkpoint import read_config, read_state


def branch_checkpoint(config: TrainConfig, spec: StreamSpec, total_samples: int) -> StoragePath:
    """The checkpoint that a new run of this config goes on from.

    Raises UserError where there is none, and where it is of a run with another stream, model or loss.
    """
    assert config.branch_from
    folder = find_checkpoint(config.branch_from)
    state = read_state(folder)
    _check_settings(folder, _kept(with_defaults(read_config(folder))), _kept(config.model_dump(mode="json")))
    if state.manifest_digest != spec.digest:
        raise UserError(f"'{folder}' was trained on another data set than the one in '{spec.folder}'")
    if config.ema and not (folder / "ema.safetensors").is_file():
        raise UserError(f"'{folder}' has no moving average to go on with: leave ema out")
    if total_samples <= state.samples_consumed:
        raise UserError(
            f"the branch is over before it begins: '{folder}' has {state.samples_consumed:,} samples behind it, "
            f"the run is of {total_samples:,} in all"
        )
    return folder


def find_checkpoint(source: str) -> StoragePath:
    """The checkpoint's folder, or, of FOLDER_OF_RUN@SAMPLES, the run's first one at or after so many samples.

    Raises UserError where the run has none.
    """
    run, _, samples = source.rpartition("@")
    if not run or not samples.isdigit():
        return storage_path(source)
    folder = RunFolder(storage_path(run))
    if latest_checkpoint(str(folder.checkpoints)) is None:
        raise UserError(f"'{run}' holds no run with a checkpoint")
    whole = [(checkpoint, read_state(checkpoint).samples_consumed) for checkpoint, _ in folder.evaluated_checkpoints()]
    for checkpoint, samples_consumed in whole:
        if samples_consumed >= int(samples):
            return checkpoint
    raise UserError(f"'{run}' has no checkpoint at or after {int(samples):,} samples; its last is at {whole[-1][1]:,}")


def branch_tags(checkpoint: StoragePath) -> dict[str, str]:
    """What MLflow says of a run that goes on from this checkpoint."""
    return {"branched_from": str(checkpoint), "branched_at": str(read_state(checkpoint).samples_seen)}


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that must be the trunk's."""
    decisive = without(config, keys_with(TrainConfig, Effect.SAME_RESULT, Effect.BY_CONTENT))
    return {key: decisive.get(key) for key in sorted(keys_with(TrainConfig, Effect.OF_TRUNK))}


def _check_settings(folder: StoragePath, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in before:
        if not same(before[key], now[key]):
            changed = difference(key, before[key], now[key])
            raise UserError(
                f"'{folder}' is of a run with {changed}: a branch goes on with what its trunk would have seen"
            )
