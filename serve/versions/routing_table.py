"""What the coordinator and the other replicas tell each other."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["image", "text", "ingress"]
Phase = Literal["serving", "stopping", "closed"]
"""stopping: not ready any more, but what comes is answered; closed: what was accepted is finished, no more is."""


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
    """Which versions take the traffic, with their shares, and which are to be loaded.

    `templates` are those that a version's training measured zero-shot with, where it did. `loading` names the towers
    that no replica has ready yet: before there is one of each, nothing can be answered.
    """

    traffic: dict[str, float]
    sources: dict[str, VersionSource]
    templates: dict[str, str | list[str]] = field(default_factory=dict)
    loading: tuple[str, ...] = ()
    phase: Phase = "serving"


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says of itself every `poll_s`: its versions, those it could not load and why, its metrics, and of
    an ingress how many requests it is answering."""

    replica: str
    kind: Kind
    loaded: dict[str, ModelInfo] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    metrics: list[Any] = field(default_factory=list)
    running: int = 0
