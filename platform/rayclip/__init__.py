"""rayclip: train, measure, tune and serve your own CLIP on a Ray cluster.

    model = rayclip.load("models:/mine@champion")
    model.classify(["a.jpg", "b.jpg"], ["a cat", "a dog"]).best

`import rayclip` imports nothing else; each name brings what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayclip.api.jobs import EmbedResult, EvaluationResult, TrainResult, embed, evaluate, train
    from rayclip.api.loading import load
    from rayclip.errors import UserError
    from rayclip.inference.model import Classification, Model

__version__ = "0.1.0"

__all__ = [
    "Classification",
    "EmbedResult",
    "EvaluationResult",
    "Model",
    "TrainResult",
    "UserError",
    "__version__",
    "embed",
    "evaluate",
    "load",
    "train",
]

_MODULES = {
    "Classification": "rayclip.inference.model",
    "EmbedResult": "rayclip.api.jobs",
    "EvaluationResult": "rayclip.api.jobs",
    "Model": "rayclip.inference.model",
    "TrainResult": "rayclip.api.jobs",
    "UserError": "rayclip.errors",
    "embed": "rayclip.api.jobs",
    "evaluate": "rayclip.api.jobs",
    "load": "rayclip.api.loading",
    "train": "rayclip.api.jobs",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'rayclip' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
