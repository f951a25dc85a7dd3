"""How a model is named. It imports no MLflow, which takes two seconds."""

import re

from rayclip.errors import UserError
from rayclip.io.storage import is_remote

REGISTERED = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<number>\d+))")
FORMS = "a model is models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint or exported weights, also in S3"


def is_registered(uri: str) -> bool:
    """Whether it names a registered model, whose alias may move, and not a folder. Raises UserError for neither."""
    if REGISTERED.fullmatch(uri):
        return True
    if uri.startswith("models:") or ("://" in uri and not is_remote(uri)) or not uri:
        raise UserError(f"'{uri}' names no model: {FORMS}")
    return False
