"""Learning rates as functions of samples seen, so that a run means the same at any batch and world size."""

import math

from rayclip.config import OptimizerConfig


def learning_rate(samples_seen: int, settings: OptimizerConfig, total_samples: int) -> float:
    """The learning rate for the step that starts at `samples_seen`, of a run of `total_samples`.

    It rises linearly to its peak over the warm-up. Then it falls along half a cosine to zero, or (wsd) stays at the
    peak until the last `cooldown_samples`, over which it falls to zero. The square root is Hägele et al.'s
    (arXiv:2405.18392), who found that it ends lower than a line.
    """
    warmup, cooldown = settings.warmup_samples, settings.cooldown_samples
    if samples_seen < warmup:
        return settings.lr * (samples_seen + 1) / warmup
    if settings.schedule == "cosine":
        progress = min(1.0, (samples_seen - warmup) / max(1, total_samples - warmup))
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
    progress = min(1.0, max(0, samples_seen - (total_samples - cooldown)) / cooldown) if cooldown else 0.0
    return settings.lr * (1.0 - (math.sqrt(progress) if settings.cooldown_shape == "sqrt" else progress))
