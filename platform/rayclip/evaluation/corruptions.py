"""Pictures made worse in seven ways at five strengths, after Hendrycks and Dietterich 2019 (arXiv:1903.12261).

Their strengths are for pictures of 224 pixels. Smaller ones carry less: there, as about in their own set of 32 pixels,
noise, blur, JPEG and pixelation weaken with the root of the side. In larger ones a blur keeps its share of the picture.

Shapes: N pictures, H and W their sides.
"""

import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from rayclip.errors import UserError, nearest

STRENGTHS = (1, 2, 3, 4, 5)
_SIDE = 224

_Corruption = Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]
"""Of a picture [H, W, 3] in 0..1, the strength counted from 0, the side over 224, and what it draws from."""


def corrupt(image_HW3: np.ndarray, name: str, strength: int, position: int, seed: int = 0) -> np.ndarray:
    """A worse picture of the same size, both uint8 [H, W, 3].

    What is random is a function of (seed, name, strength, position) alone: the picture at a position of a data set
    is the same for every model, whoever makes it. Raises UserError for an unknown name and a strength beyond 1..5.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption '{name}': {nearest(name, list(CORRUPTIONS))}")
    if strength not in STRENGTHS:
        raise UserError(f"corruption '{name}' has strengths 1 to 5, got {strength}")
    if image_HW3.dtype != np.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != 3:
        raise ValueError(f"a picture must be uint8 [H, W, 3], got {image_HW3.dtype} {list(image_HW3.shape)}")
    random = np.random.default_rng((seed, zlib.crc32(name.encode()), strength, position))
    scale = min(image_HW3.shape[:2]) / _SIDE
    return _to_uint8(CORRUPTIONS[name](image_HW3 / np.float32(255), strength - 1, scale, random))


def _weaker(scale: float) -> float:
    return min(1.0, scale) ** 0.5


def _gaussian_noise(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    spread = (0.08, 0.12, 0.18, 0.26, 0.38)[level] * _weaker(scale)
    return x + spread * random.standard_normal(x.shape, dtype=np.float32)


def _shot_noise(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    # Photons at full brightness: noise goes with the root of their inverse.
    photons = (60, 25, 12, 5, 3)[level] / _weaker(scale) ** 2
    return random.poisson(x * photons) / photons


def _blur(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    radius = (1, 2, 3, 4, 6)[level] * max(scale, _weaker(scale))
    return np.asarray(_to_image(x).filter(ImageFilter.GaussianBlur(radius))) / 255


def _contrast(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return mean + (0.4, 0.3, 0.2, 0.1, 0.05)[level] * (x - mean)


def _brightness(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    """The value of HSV raised, hue and saturation kept; black becomes grey."""
    added = (0.1, 0.2, 0.3, 0.4, 0.5)[level]
    value = x.max(axis=2, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * (raised / np.maximum(value, 1e-6)), raised)


def _jpeg(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    quality = round(100 - _weaker(scale) * (100 - (25, 18, 15, 10, 7)[level]))
    coded = io.BytesIO()
    _to_image(x).save(coded, format="JPEG", quality=quality)
    return np.asarray(Image.open(coded)) / 255


def _pixelate(x: np.ndarray, level: int, scale: float, random: np.random.Generator) -> np.ndarray:
    share = 1 - _weaker(scale) * (1 - (0.6, 0.5, 0.4, 0.3, 0.25)[level])
    image = _to_image(x)
    small = (max(1, round(image.width * share)), max(1, round(image.height * share)))
    coarse = image.resize(small, Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.NEAREST)) / 255


CORRUPTIONS: dict[str, _Corruption] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "gaussian_blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
    "pixelate": _pixelate,
}


def _to_uint8(x: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _to_image(x: np.ndarray) -> Image.Image:
    return Image.fromarray(_to_uint8(x))
