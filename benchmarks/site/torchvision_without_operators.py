"""Lets `import torchvision` pass beside a CPU build of torch; `make peers` puts this into the environment.

torchvision has no build for CPU torch. open_clip and transformers import it and call none of its operators, but without
their names it fails to import. This module is imported at every start of Python, so it waits for the import of
torchvision before it imports torch.
"""

import sys
from importlib.abc import MetaPathFinder


class _BeforeTorchvision(MetaPathFinder):
    """Names the operators when torchvision is looked for, and leaves finding it to others."""

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        for operator in ("nms", "qnms") if torch.version.cuda is None else ():
            if not hasattr(torch.ops.torchvision, operator):
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor"
                )


sys.meta_path.insert(0, _BeforeTorchvision())
