"""The base of all settings, and the marks that say on a field what is known of it.

A mark stands in the field's `Annotated`: whether its value is a path (`InputPath` and its kin), what it has to do with
the result (`Effect`), and what it was called before (`RenamedFrom`). `config/fields.py` reads them.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all settings: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class PathMark:
    """What lies at a value that is a path or an address: `read` or `write` by the job, or a `cache` that it can do
    without; None: it is no path, however much it reads like one.
    """

    access: Literal["read", "write", "cache"] | None
    may_be_registered: bool = False
    """Whether it may name a registered model, as models:/NAME@ALIAS, in place of a path."""
    may_be_name: bool = False
    """Whether it is a name of something else where nothing lies at it."""


InputPath = Annotated[str, PathMark("read")]
InputModel = Annotated[str, PathMark("read", may_be_registered=True)]
InputPathOrName = Annotated[str, PathMark("read", may_be_name=True)]
AnyOrInputPath = Annotated[Any, PathMark("read", may_be_name=True)]
OutputPath = Annotated[str, PathMark("write")]
CachePath = Annotated[str, PathMark("cache")]
NotPath = Annotated[str, PathMark(None)]


@dataclass(frozen=True)
class TrackingMark:
    """The field is the URI of an MLflow store; `always`: the job writes to it whatever its other settings are."""

    always: bool = False


TrackingUri = Annotated[str, TrackingMark()]
"""Of a job that looks registered models up, or logs its result where it is asked to."""


class Effect(Enum):
    """How a setting bears on what a job makes. One without such a mark decides it, and stays when a job goes on."""

    SAME_RESULT = "the result is the same whatever it is, up to rounding: it may change when a job goes on"
    BY_CONTENT = "the content of what it names decides, which a digest in the record tells, not where that lies"
    OF_TRUNK = "a branch of a training run has it from its trunk"
    SAME_IN_TRIALS = "trials of a search have it in common, or they could not be compared"


@dataclass(frozen=True)
class RenamedFrom:
    """The key that the field had in the last release, which is still taken."""

    key: str
