"""A trained CLIP, ready to use: images and texts in, features and zero-shot answers out.

Shapes: N images or texts, C labels, D features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from rayclip.errors import UserError, nearest
from rayclip.inference.encoder import Encoder
from rayclip.inference.images import ImageInput, each_image, preprocess
from rayclip.inference.prompts import DEFAULT_TEMPLATES, resolve_templates
from rayclip.inference.zero_shot import (
    check_class_names,
    class_prompts,
    independent_scores,
    mean_of_prompts,
    zero_shot_probabilities,
)
from rayclip.models.clip import CLIP

Scores = Literal["softmax", "sigmoid", "cosine"]


class LabelScore(NamedTuple):
    """A label and its score for one image."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """What `Model.classify` returns: a score of each label for each image, and what it was computed with."""

    labels: tuple[str, ...]
    """The C labels, in the order given."""
    probabilities: np.ndarray
    """float32 [N, C]: the softmax over the labels, or the scores that were asked for."""
    templates: tuple[str, ...]
    """The prompt templates that the labels were put into."""
    model_version: str
    """The version of the model that answered."""

    @property
    def best(self) -> list[str]:
        """The most likely label of each image."""
        return [self.labels[i] for i in self.probabilities.argmax(axis=1)]

    def top(self, k: int = 5) -> list[list[LabelScore]]:
        """Return the k most likely labels of each image with their probabilities, best first."""
        order_NK = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :k]
        return [
            [LabelScore(self.labels[i], float(row_C[i])) for i in order_K]
            for order_K, row_C in zip(order_NK, self.probabilities, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.probabilities)


class Model:
    """A trained CLIP on a device, with its own tokenizer and preprocessing. `rayclip.load` makes one.

    Attributes:
        clip: the model, a `torch.nn.Module` in eval mode whose parameters need no gradient.
        name: what the model is called: its registered name, or the name of the run that trained it.
        version: what answers name: NAME/NUMBER of a registered model, else the folder and a digest of the weights.
        uri: what `rayclip.load`, `rayclip.evaluate` and the commands find this very version by.
        tracking_uri: the MLflow that a registered model's uri is of; None is the default.
    """

    def __init__(self, encoder: Encoder, name: str, version: str, uri: str, tracking_uri: str | None = None) -> None:
        self.clip: CLIP = encoder.model.eval().requires_grad_(False)
        self.name = name
        self.version = version
        self.uri = uri
        self.tracking_uri = tracking_uri
        self._encoder = encoder
        self._classes: tuple[object, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._encoder.device

    @property
    def embed_dim(self) -> int:
        """D, the length of a feature vector."""
        return int(self.clip.config.embed_dim)

    @property
    def image_size(self) -> int:
        """Pixels of a side of the square that images are resized and cropped to."""
        return int(self.clip.visual.image_size)

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before the softmax, 1 / temperature."""
        return self._encoder.logit_scale

    def encode_images(self, images: ImageInput | Iterable[ImageInput], batch_size: int = 256) -> np.ndarray:
        """Return the features of images.

        Preprocessing is the model's own, as in evaluation and in the service: EXIF's orientation, RGB with what is
        transparent on white, the shorter side resized by PIL's bicubic filter, the middle cut out.

        Args:
            images: one image, or several of any sizes and kinds, also from a generator: PIL images, paths
                (also s3://...), files' bytes, uint8 arrays [H, W] or [H, W, C], uint8 tensors [C, H, W]. An array
                or a tensor with four axes is a batch.
            batch_size: images in the model at once.

        Returns:
            float32 [N, D], each of length 1; N is 1 for a single image.

        Raises:
            UserError: an image cannot be read; the message begins with its index, as "images[3]".
        """
        return self._image_features(images, batch_size).cpu().numpy()

    def encode_texts(self, texts: str | Iterable[str], batch_size: int = 256) -> np.ndarray:
        """Return the features of texts.

        Args:
            texts: one text, or several. What exceeds the model's context length is cut.
            batch_size: texts in the model at once.

        Returns:
            float32 [N, D], each of length 1; N is 1 for a single text.

        Raises:
            UserError: one is no text; the message begins with its index.
        """
        return self._encoder.encode_texts(_texts(texts, "texts"), _checked_batch(batch_size)).cpu().numpy()

    def classify(
        self,
        images: ImageInput | Iterable[ImageInput],
        labels: Iterable[str],
        templates: str | Sequence[str] | None = None,
        *,
        scores: Scores = "softmax",
        batch_size: int = 256,
    ) -> Classification:
        """Classify images by the names of the classes alone (zero-shot), as the service's /v1/zero-shot does.

        Args:
            images: one image, or several, as `encode_images` takes them.
            labels: the names of the C classes.
            templates: a named set ("plain", "photo", "photo_ensemble", "glyphs", "emoji"), a template that holds {}
                where the name goes, or several; the features of a label's prompts are averaged. None: "photo_ensemble",
                the service's default.
            scores: "softmax": probabilities over the labels; "sigmoid": each label by itself, where several may be
                true, or none; "cosine": the bare similarity.
            batch_size: images in the model at once.

        Returns:
            Probabilities [N, C]; `.best` and `.top(k)` read them.

        Raises:
            UserError: an image cannot be read, there are no labels, or the templates are unknown.
        """
        names = tuple(_texts(labels, "labels"))
        resolved = resolve_templates(DEFAULT_TEMPLATES if templates is None else templates)
        if scores not in get_args(Scores):
            raise UserError(f"unknown scores '{scores}': {nearest(str(scores), list(get_args(Scores)))}")
        background_D, classes_CD = self._class_rows(names, resolved)
        image_ND = self._image_features(images, batch_size)
        if scores == "softmax":
            scores_NC = zero_shot_probabilities(image_ND, classes_CD, self.logit_scale)
        elif scores == "sigmoid":
            scores_NC = independent_scores(image_ND, classes_CD, background_D, self.logit_scale)
        else:
            scores_NC = image_ND @ classes_CD.T
        return Classification(names, scores_NC.cpu().numpy(), resolved, self.version)

    def __repr__(self) -> str:
        return f"<rayclip.Model {self.version}: {self.image_size} px to {self.embed_dim} features, on {self.device}>"

    def _image_features(self, images: ImageInput | Iterable[ImageInput], batch_size: int) -> Tensor:
        size = _checked_batch(batch_size)
        parts = [
            self._encoder.encode_images(pixels, size)
            for pixels in preprocess(each_image(images), self.image_size, size)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.embed_dim, device=self.device)

    def _class_rows(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Return the row [D] of the empty name, the background of independent scores, and the labels' rows [C, D]."""
        # Images often come a few at a time for the same labels, whose prompts may be many more.
        key = labels, templates
        if self._classes is None or self._classes[0] != key:
            check_class_names(labels)
            prompts, rows_TC = class_prompts(["", *labels], templates)
            self._classes = key, mean_of_prompts(self._encoder.encode_texts(prompts), rows_TC)
        return self._classes[1][0], self._classes[1][1:]


def _texts(texts: str | Iterable[str], what: str) -> list[str]:
    found = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise UserError(f"{what}[{index}] is of type {type(text).__name__}; it must be a str")
    return found


def _checked_batch(batch_size: int) -> int:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    return batch_size
