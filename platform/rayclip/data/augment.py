"""What training changes in a picture beside cutting it: whether it is mirrored, and its colours. All of it on uint8.

Shapes: S the side of a crop.
"""

from dataclasses import dataclass

import numpy as np

NUM_DRAWS = 7
"""Numbers in [0, 1) that an augmentation takes: flip; whether the colours are changed, then brightness, contrast,
saturation and hue; grey."""

# Luma of ITU-R BT.601, and the YIQ axes in which hue is an angle.
_LUMA = np.array([0.299, 0.587, 0.114])
_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_FROM_YIQ = np.linalg.inv(_YIQ)
_NO_JITTER = (0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a crop; what the fields mean is in `config.DataConfig`."""

    flip: float = 0.0
    colour_jitter: tuple[float, float, float, float] = _NO_JITTER
    colour_jitter_share: float = 0.8
    grey: float = 0.0

    def of(self, pixels_SS3: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The crop as the draws, float64 [NUM_DRAWS], would have it; uint8 [S, S, 3] both."""
        if draws[0] < self.flip:
            pixels_SS3 = pixels_SS3[:, ::-1]
        if self.colour_jitter != _NO_JITTER and draws[1] < self.colour_jitter_share:
            pixels_SS3 = jitter(pixels_SS3, self.colour_jitter, draws[2:6])
        return to_grey(pixels_SS3) if draws[6] < self.grey else pixels_SS3


def jitter(pixels_SS3: np.ndarray, strength: tuple[float, float, float, float], draws: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue, in this order, by up to `strength` each: one affine map of the colours.

    The first three are torchvision's, which cuts to [0, 255] after each where this does once. Hue is turned in YIQ, by
    up to `strength` of a whole turn either way.
    """
    brightness, contrast, saturation = (1 + s * (2 * d - 1) for s, d in zip(strength[:3], draws[:3], strict=True))
    angle = 2 * np.pi * strength[3] * (2 * draws[3] - 1)
    mean = float(pixels_SS3.mean(axis=(0, 1)) @ _LUMA) * brightness
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    saturate = saturation * np.eye(3) + (1 - saturation) * _LUMA
    # Grey stays grey under the last two, so the contrast's offset passes through them.
    matrix = (brightness * contrast * _FROM_YIQ @ turn @ _YIQ @ saturate).astype(np.float32)
    offset = np.float32((1 - contrast) * mean + 0.5)
    return (pixels_SS3.astype(np.float32) @ matrix.T + offset).clip(0, 255).astype(np.uint8)


def to_grey(pixels_SS3: np.ndarray) -> np.ndarray:
    """Its luma in all three colours."""
    luma_SS = pixels_SS3.astype(np.float32) @ _LUMA.astype(np.float32) + np.float32(0.5)
    return np.broadcast_to(luma_SS.astype(np.uint8)[..., None], pixels_SS3.shape)
