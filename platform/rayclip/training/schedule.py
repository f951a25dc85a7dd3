"""Learning rates as functions of samples seen, so that a run means the same at any batch and world size."""

import math


def warmup_cosine(samples_seen: int, peak: float, warmup_samples: int, total_samples: int) -> float:
    """The learning rate for the step that starts at `samples_seen`.

    Rises linearly to `peak` over the warm-up, then falls along half a cosine to zero at `total_samples`.
    """
    if samples_seen < warmup_samples:
        return peak * (samples_seen + 1) / warmup_samples
    decay = min(1.0, (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples))
    return peak * 0.5 * (1.0 + math.cos(math.pi * decay))
