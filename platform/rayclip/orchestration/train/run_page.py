"""What a training run's page in MLflow says of it: a description, the code, the data sets."""

import json
import re

from mlflow.exceptions import MlflowException

from rayclip.config import ModelConfig, TrainConfig
from rayclip.data.manifest import Manifest
from rayclip.data.stream import Stream, StreamSpec
from rayclip.orchestration.cluster.progress import Line
from rayclip.orchestration.train.run_context import RunContext
from rayclip.scaling.flops import num_parameters
from rayclip.tracking.mlflow import DataSetInput, fill_run

_COMMIT = re.compile(r"[0-9a-f]{40}")


def page_tags(config: TrainConfig, spec: StreamSpec, version: str) -> dict[str, str]:
    """Return the tags that a run begins with, MLflow's own for its source among them."""
    tags = {
        "code_version": version,
        "manifest_digest": spec.digest,
        "data": spec.folder,
        "data_parts": json.dumps(Stream(spec).manifest.parts()),
        "mlflow.source.name": f"rayclip train {config.name}",
        "mlflow.source.type": "LOCAL",
    }
    commit = _COMMIT.match(version)
    return tags | ({"mlflow.source.git.commit": commit[0]} if commit else {})


def fill_page(context: RunContext, line: Line) -> None:
    """Put the description and the data sets on the run's page, while its workers start."""
    text = describe_run(context.config, context.spec, context.total_samples, context.code_version)
    try:
        fill_run(context.tracking_uri, context.mlflow_run_id, text, data_sets(context.config, context.spec))
    except MlflowException as error:  # it does not stop a run
        line.note(f"MLflow did not take the run's description: {' '.join(str(error).split())}")


def describe_run(config: TrainConfig, spec: StreamSpec, total_samples: int, version: str) -> str:
    """Return the run's description, in Markdown: the model and its size, the data, what is trained, by which code."""
    assert isinstance(config.model, ModelConfig)
    vision, text = config.model.vision, config.model.text
    data = ", ".join(f"`{part['path']}` ({part['samples']:,} samples)" for part in Stream(spec).manifest.parts())
    lines = [
        f"a CLIP with {num_parameters(config.model) / 1e6:.1f} million parameters: images of {vision.image_size} px, "
        f"captions of up to {text.context_length} tokens, {config.model.embed_dim} dimensions",
        f"trained on {data}",
        f"{total_samples:,} samples in batches of {config.batch_size:,}, loss {config.loss.kind}, seed {config.seed}",
        f"code `{version}`, run folder `{config.runs}/{config.name}`",
    ]
    return "\n".join(f"- {line}" for line in lines)


def data_sets(config: TrainConfig, spec: StreamSpec) -> list[DataSetInput]:
    """Return the data sets that the run trains on and is measured on."""
    trained = [
        DataSetInput(part["path"], Manifest.load(part["path"]).digest, "training", part["samples"])
        for part in Stream(spec).manifest.parts()
    ]
    measured = []
    for task in config.evaluation.tasks.values():
        manifest = Manifest.load(task.path)
        measured.append(DataSetInput(task.path, manifest.digest, "evaluation", manifest.total_samples))
    return trained + measured
