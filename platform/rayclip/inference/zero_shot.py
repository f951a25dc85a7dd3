"""Zero-shot classification: a class is the mean of its prompts, an answer the softmax over scaled cosines.

Shapes: B pictures, C classes, T templates, E embedding.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rayclip.errors import UserError
from rayclip.inference.encoder import Encoder
from rayclip.inference.prompts import fill, resolve_templates


def class_matrix(encoder: Encoder, class_names: Sequence[str], templates: str | Sequence[str]) -> Tensor:
    """One row a class, float32 [C, E], L2-normalised: each prompt's feature normalised, their mean normalised again.

    Classes are keyed by index, so a name may stand twice; a prompt that stands more than once is encoded once.
    Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.4. Raises UserError for an empty list, an empty
    name, and templates that `resolve_templates` refuses.
    """
    resolved = resolve_templates(templates)
    check_class_names(class_names)
    row_of: dict[str, int] = {}
    rows = [[row_of.setdefault(fill(template, name), len(row_of)) for name in class_names] for template in resolved]
    features = F.normalize(encoder.encode_texts(list(row_of)), dim=-1)
    # Summed a template at a time: the [C, T, E] block of a thousand classes and 80 templates is never built.
    total_CE = torch.zeros(len(class_names), features.shape[-1], device=features.device)
    for rows_C in torch.tensor(rows, device=features.device):
        total_CE += features[rows_C]
    return F.normalize(total_CE / len(resolved), dim=-1)


def zero_shot_probabilities(image_features_BE: Tensor, class_matrix_CE: Tensor, logit_scale: float) -> Tensor:
    """Probabilities [B, C]: softmax over classes of the cosines times the model's logit scale (not its logarithm)."""
    return (logit_scale * image_features_BE.float() @ class_matrix_CE.float().T).softmax(dim=-1)


def check_class_names(class_names: Sequence[str]) -> None:
    """Raise UserError where the list is empty or holds an empty name."""
    if not class_names:
        raise UserError("the list of classes is empty: zero-shot needs at least one class name")
    for index, name in enumerate(class_names):
        if not name.strip():
            raise UserError(f"class {index} of {len(class_names)} has an empty name")
