"""What the coordinator and the other replicas tell each other."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["image", "text", "ingress"]


@dataclass(frozen=True)
class VersionSource:
    """Where a version's weights are: under `folder` on the coordinator's machine, by `uri` from everywhere."""

    uri: str
    folder: str


@dataclass(frozen=True)
class ModelInfo:
    """What a loaded model is like."""

    embed_dim: int
    image_size: int
    logit_scale: float


@dataclass(frozen=True)
class RoutingTable:
    """Which versions take the traffic, with their shares, and which are to be loaded."""

    traffic: dict[str, float]
    sources: dict[str, VersionSource]


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says of itself every `poll_s`: its versions, those it could not load and why, its metrics."""

    replica: str
    kind: Kind
    loaded: dict[str, ModelInfo] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
