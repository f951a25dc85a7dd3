"""Two ways of answering compared on the same pictures: what one gains, and whether that may be chance.

Shapes: N pictures, T templates.
"""

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from rayclip.errors import UserError

_NORMAL_95 = 1.959963984540054
_RESAMPLES = 1000


@dataclass(frozen=True)
class Gain:
    """How much larger the share of right answers is, with its 95% interval, and McNemar's two-sided exact p.

    `won` pictures are right with the one and wrong with the other, `lost` the other way round.
    """

    value: float
    low: float
    high: float
    won: int
    lost: int
    p_value: float


def paired_gain(right_N: Tensor, other_right_N: Tensor) -> Gain:
    """What the first gains over the second; both bool [N], whether each picture's answer is right.

    The interval is Agresti and Min's (2005) for matched pairs: half a picture is added to each kind of outcome, so it
    keeps its width where no picture differs. Raises UserError without pictures, and for answers to different ones.
    """
    if len(right_N) != len(other_right_N) or not len(right_N):
        raise UserError(f"a gain needs both answers to the same pictures, got {len(right_N)} and {len(other_right_N)}")
    num = len(right_N)
    won, lost = int((right_N & ~other_right_N).sum()), int((~right_N & other_right_N).sum())
    centre = (won - lost) / (num + 2)
    half = _NORMAL_95 * math.sqrt(max(0.0, (won + lost + 1) / (num + 2) - centre**2) / (num + 2))
    p_value = float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return Gain((won - lost) / num, max(-1.0, centre - half), min(1.0, centre + half), won, lost, p_value)


@dataclass(frozen=True)
class BestTemplate:
    """The best single template by its index, and what the ensemble gains over it, with a 95% interval that takes into
    account that the best was chosen on the same pictures."""

    index: int
    gain: float
    low: float
    high: float


def gain_over_best(ensemble_right_N: Tensor, template_right_TN: Tensor) -> BestTemplate:
    """Against the best of T templates, each bool [N]: a bootstrap over pictures, in each draw of which the best is
    chosen anew. Of equal templates the first is the best. Raises UserError without templates or pictures.
    """
    if not template_right_TN.numel() or template_right_TN.shape[1] != len(ensemble_right_N):
        raise UserError(
            f"an ensemble's gain needs pictures and the answers of its templates to them, "
            f"got {len(ensemble_right_N)} pictures and answers {list(template_right_TN.shape)}"
        )
    num = len(ensemble_right_N)
    rows_TN = torch.cat([ensemble_right_N[None], template_right_TN]).cpu().float()
    # A draw is how often each picture comes: shares are one product, whole numbers that float32 holds.
    generator = torch.Generator().manual_seed(0)
    gains = []
    for _ in range(_RESAMPLES):
        counts_N = torch.bincount(torch.randint(num, (num,), generator=generator), minlength=num).float()
        shares = (rows_TN @ counts_N) / num
        gains.append(float(shares[0] - shares[1:].max()))
    low, high = torch.tensor(gains).quantile(torch.tensor([0.025, 0.975])).tolist()
    right_T = template_right_TN.sum(dim=1)
    best = int(right_T.argmax())
    return BestTemplate(best, (int(ensemble_right_N.sum()) - int(right_T[best])) / num, low, high)
