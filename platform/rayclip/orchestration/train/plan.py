"""What a run is to train on and for how long, from its settings and its data.

It imports neither torch nor Ray nor MLflow: mistakes are told before they are imported, which takes seconds.
"""

from collections.abc import Mapping
from typing import Any

from rayclip.config import ModelConfig, TrainConfig
from rayclip.config.base import PathMark
from rayclip.config.fields import map_paths
from rayclip.data.augment import Augmentation
from rayclip.data.manifest import Manifest
from rayclip.data.mixture import Mixture, MixturePart, load_parts
from rayclip.data.order import Order
from rayclip.data.stream import Stream, StreamSpec
from rayclip.data.tokenizer import check_vocabulary
from rayclip.errors import UserError
from rayclip.io.storage import absolute
from rayclip.models.presets import preset, with_logit_bias
from rayclip.tracking.model_uri import is_registered


def resolve(config: TrainConfig) -> TrainConfig:
    """The config with its model in full, and paths that hold in any folder. Raises UserError for an unknown model."""
    model = preset(config.model) if isinstance(config.model, str) else config.model
    if config.loss.kind == "sigmoid":
        model = with_logit_bias(model)
    return map_paths(config.model_copy(update={"model": model}), _absolute)


def _absolute(path: str, mark: PathMark) -> str:
    return path if mark.may_be_registered and is_registered(path) else absolute(path)


def has_other_data(config: TrainConfig, summary: Mapping[str, Any]) -> bool:
    """Whether a complete run was trained on a data set that is another one now; one that is gone has not changed."""
    if "manifest_digest" not in summary:  # of an older version
        return False
    try:
        return _load_data(config)[0].digest != summary["manifest_digest"]
    except UserError:
        return False


def plan_stream(config: TrainConfig, may_lack_shards: bool = False) -> StreamSpec:
    """Return the stream of a run. Raises UserError where the data does not fit the run.

    Of a run that goes on shards may have gone since: their samples are counted, as they are while it runs.
    """
    model = config.model
    assert isinstance(model, ModelConfig)
    check_vocabulary(model.text.vocab_size)
    whole, folder, parts = _load_data(config)
    whole.check_shards(may_lack_shards)
    manifest = whole.subset(config.data.fraction, config.seed)
    if config.batch_size > manifest.total_samples:
        fraction = config.data.fraction
        which = "which has" if fraction == 1 else f"of which data.fraction {fraction:g} has"
        raise UserError(
            f"batch_size {config.batch_size:,} is larger than the data set in '{folder}', "
            f"{which} {manifest.total_samples:,} samples"
        )
    end = (config.epochs or 0) * Order(config.seed, manifest.shares).num_slots
    return StreamSpec(
        folder=folder,
        digest=whole.digest,
        seed=config.seed,
        end=Stream.position_at(manifest, config.seed, config.samples) if config.samples else end,
        window=config.data.shuffle_window,
        image_size=model.vision.image_size,
        context_length=model.text.context_length,
        crop_scale=config.data.crop_scale,
        crop_ratio=config.data.crop_ratio,
        augmentation=Augmentation(
            config.data.flip, config.data.colour_jitter, config.data.colour_jitter_share, config.data.grey
        ),
        fraction=config.data.fraction,
        captions=config.data.captions,
        mixture=parts,
    )


def _load_data(config: TrainConfig) -> tuple[Manifest | Mixture, str, tuple[MixturePart, ...]]:
    """(the whole data set, where it is in words, the parts of a mixture). Raises UserError."""
    parts = tuple(MixturePart(part.path, part.weight) for part in config.data.mixture)
    folder = config.data.path or " + ".join(f"{part.weight:g} x {part.path}" for part in parts)
    return load_parts(folder, parts), folder, parts
