"""What every job's settings have in common."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Base of all settings: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
