"""Zero-shot classification: a class is the mean of its prompts, an answer the softmax over scaled cosines.

Shapes: B pictures, C classes, T templates, P distinct prompts, E embedding.
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
    prompts, rows_TC = class_prompts(class_names, resolved)
    return mean_of_prompts(encoder.encode_texts(prompts), rows_TC)


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """The distinct prompts, and for each template and class, [T, C], which of them it is."""
    row_of: dict[str, int] = {}
    rows = [[row_of.setdefault(fill(template, name), len(row_of)) for name in class_names] for template in templates]
    return list(row_of), rows


def mean_of_prompts(features_PE: Tensor, rows_TC: Sequence[Sequence[int]]) -> Tensor:
    """The classes' rows [C, E] from the features of P distinct prompts and the places that `class_prompts` gave."""
    features_PE = F.normalize(features_PE, dim=-1)
    # Summed a template at a time: the [C, T, E] block of a thousand classes and 80 templates is never built.
    total_CE = torch.zeros(len(rows_TC[0]), features_PE.shape[-1], device=features_PE.device)
    for rows_C in torch.tensor(rows_TC, device=features_PE.device):
        total_CE += features_PE[rows_C]
    return F.normalize(total_CE / len(rows_TC), dim=-1)


def zero_shot_probabilities(image_features_BE: Tensor, class_matrix_CE: Tensor, logit_scale: float) -> Tensor:
    """Probabilities [B, C]: softmax over classes of the cosines times the model's logit scale (not its logarithm)."""
    return (logit_scale * image_features_BE.float() @ class_matrix_CE.float().T).softmax(dim=-1)


def independent_scores(
    image_features_BE: Tensor, class_matrix_CE: Tensor, background_E: Tensor, logit_scale: float
) -> Tensor:
    """Scores [B, C] of labels that may all be true, or none: each label alone against the background.

    A model trained with a softmax has no threshold of its own. `background_E` is the class row of the empty name, the
    templates saying nothing; a label's score is the softmax over the two, sigmoid(scale * (cos - cos_background)).
    """
    cosine_BC = image_features_BE.float() @ class_matrix_CE.float().T
    background_B1 = (image_features_BE.float() @ background_E.float())[:, None]
    return (logit_scale * (cosine_BC - background_B1)).sigmoid()


def check_class_names(class_names: Sequence[str]) -> None:
    """Raise UserError where the list is empty or holds an empty name."""
    if not class_names:
        raise UserError("the list of classes is empty: zero-shot needs at least one class name")
    for index, name in enumerate(class_names):
        if not name.strip():
            raise UserError(f"class {index} of {len(class_names)} has an empty name")
