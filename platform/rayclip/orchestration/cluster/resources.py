"""Whether a cluster can place a job: what the job takes at once, against the nodes that there are and that may come."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from rayclip.config import ClusterConfig, Config, TrainConfig, WorkersConfig

Bundle = dict[str, float]
"""Resources that one process takes of one node, or that a node has: {"CPU": 4, "GPU": 1}."""

MOST_LABELS = {"CPU": "rayclip/max-cpus", "GPU": "rayclip/max-gpus"}
"""Labels of a node, usually the head, that say what an autoscaler may grow the cluster to: Ray's API does not."""


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster, and what all of them may come to."""

    nodes: list[Bundle]
    most: Bundle
    """Empty where the cluster does not say that it grows."""


def most_of(labels: Sequence[Mapping[str, str]]) -> Bundle:
    """What the cluster may grow to in all, by its nodes' labels."""
    said = {name: [node[key] for node in labels if key in node] for name, key in MOST_LABELS.items()}
    return {name: max(float(value) for value in values) for name, values in said.items() if values}


def resource_request(config: Config) -> list[Bundle]:
    """What a job takes of the cluster at once, a bundle a process. The job's own process takes none."""
    workers = getattr(config, "cluster", None)
    if isinstance(config, TrainConfig):
        reader = {"CPU": 1.0}  # which reads ahead for the workers
        validation = [validation_resources(config)] if config.evaluation.is_asynchronous else []
        return [worker_resources(config.cluster)] * config.cluster.min_workers + [reader, *validation]
    if isinstance(workers, WorkersConfig):
        return [worker_resources(workers)] * workers.num_workers
    inner = [getattr(config, name) for name in type(config).model_fields]
    # Else one task, or what the first job takes that this one starts.
    return next((resource_request(value) for value in inner if hasattr(value, "cluster")), [{"CPU": 1.0}])


def local_cpus(config: TrainConfig) -> int:
    """Return how many logical cores a Ray on this machine needs for the run, with all the workers that may come."""
    workers = config.cluster
    most_to_come = (workers.max_workers - workers.min_workers) * workers.cpus_per_worker
    return math.ceil(total(resource_request(config))["CPU"] + most_to_come)


def shortage(bundles: list[Bundle], capacity: Capacity) -> str | None:
    """What is missing, in words, or None: the nodes have room for every bundle at once, or may come to have it."""
    if _fit(bundles, _free(capacity.nodes)):
        return None
    need, has = total(bundles), total(capacity.nodes)
    may_have = {name: max(has.get(name, 0), capacity.most.get(name, 0)) for name in need}
    if capacity.most and all(may_have[name] >= amount for name, amount in need.items()):
        return None
    largest = max(bundles, key=lambda bundle: (bundle.get("GPU", 0), bundle["CPU"]))
    wants = f"it needs {format_resources(need)}, up to {format_resources(largest)} on one node"
    grows = f", which may grow to {format_resources(capacity.most)}" if capacity.most else ""
    there = format_resources({name: has.get(name, 0) for name in need})
    nodes = f"{len(capacity.nodes)} node{'s' * (len(capacity.nodes) != 1)}"
    return f"{wants}; the cluster has {there} on {nodes}{grows}"


def num_times_placed(bundles: list[Bundle], nodes: list[Bundle]) -> int:
    """How often all bundles find room on the nodes together, each on one node."""
    assert any(total(bundles).values())
    free = _free(nodes)
    return next(times for times in count() if not _fit(bundles, free))


def total(bundles: Iterable[Bundle]) -> Bundle:
    """Return the sum of bundles, by resource."""
    summed: Bundle = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            summed[name] = summed.get(name, 0) + amount
    return summed


def format_resources(bundle: Bundle) -> str:
    """Return resources in words, as "4 CPU, 1 GPU"."""
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())


def worker_resources(workers: ClusterConfig | WorkersConfig) -> Bundle:
    """Return the resources that one worker takes."""
    return {"CPU": workers.cpus_per_worker} | ({"GPU": 1.0} if workers.use_gpu else {})


def validation_resources(config: TrainConfig) -> Bundle:
    """What the process of asynchronous validation takes."""
    evaluation = config.evaluation
    gpus = float(config.cluster.use_gpu) if evaluation.validation_gpus is None else evaluation.validation_gpus
    return {"CPU": evaluation.validation_cpus} | ({"GPU": gpus} if gpus else {})


def _fit(bundles: list[Bundle], free: list[Bundle]) -> bool:
    """Take room for all bundles from what nodes have free, the largest first, each from the first that has it."""
    for bundle in sorted(bundles, key=lambda bundle: (-bundle.get("GPU", 0), -bundle["CPU"])):
        node = next((n for n in free if all(n.get(name, 0) >= amount for name, amount in bundle.items())), None)
        if node is None:
            return False
        for name, amount in bundle.items():
            node[name] -= amount
    return True


def _free(nodes: list[Bundle]) -> list[Bundle]:
    """Nodes without a GPU are filled first, to leave the others to who needs them."""
    return [dict(node) for node in sorted(nodes, key=lambda node: node.get("GPU", 0))]
