"""The forms of a law, and their fits to many resamples at once. All are one sum, fitted on the logarithm of the error:

    error = E + sum_i exp(a_i - alpha_i z_i)

`power` and `power_limit` have one term with z = log C, and power has E = 0; `shifted_limit` has z = log(C + B);
`chinchilla` has two, with log N and log D. All z are counted from the runs' mean, which keeps amplitude and exponent
apart; `Form.figures` gives them as they are published.

Shapes: R resamples, M places of a selection, T terms, K parameters [E, a_1, alpha_1, ...] and the shift last.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import nnls

from rayclip.config import LawForm
from rayclip.scaling.frontier import Selection

_EXPONENTS = (1e-3, 5.0)  # bounds
_AMPLITUDE = 60.0  # bound of |a|
_BELOW_LEAST = 0.999  # most that the limit may be, of the least error
_START_EXPONENTS = np.geomspace(0.02, 1.5, 14)
_NUM_STARTS = 12
_NUM_STEPS = 200
_HUBER_DEVIATIONS = 1.345  # beyond these a residual counts linearly: 95% as sharp as squares where noise is normal
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution
_LEAST_HUBER = 1e-4


@dataclass(frozen=True)
class Form:
    """A form for certain runs: their mean logarithms of N and D, and the range of the shift's."""

    name: LawForm
    origin: tuple[float, float]
    shift_range: tuple[float, float]

    @classmethod
    def of(cls, name: LawForm, runs: Selection) -> "Form":
        """The form, centred on the one resample that `runs` has."""
        kept = runs.weight[0] > 0
        compute, gmacs = runs.compute[0][kept], runs.gmacs[0][kept]
        span = compute.max() - compute.min()
        low, high = compute.min() - compute.mean() - span, compute.max() - compute.mean()
        return cls(name, (float(gmacs.mean()), float((compute - gmacs).mean())), (float(low), float(high)))

    @property
    def num_parameters(self) -> int:
        """Number of free parameters."""
        return {"power": 2, "power_limit": 3, "shifted_limit": 4, "chinchilla": 5}[self.name]

    def coordinates(self, runs: Selection) -> np.ndarray:
        """log C, or log N and log D, from the origin, [R, T, M]."""
        gmacs, samples = runs.gmacs - self.origin[0], runs.compute - runs.gmacs - self.origin[1]
        return np.stack([gmacs, samples] if self.name == "chinchilla" else [gmacs + samples], axis=1)

    def log_error(self, theta_RK: np.ndarray, z_RTM: np.ndarray) -> np.ndarray:
        """The law's logarithm at these coordinates, [R, M]."""
        limit_R1, terms_RTM, _ = self._terms(theta_RK, z_RTM)
        return np.log(limit_R1 + terms_RTM.sum(axis=1))

    def jacobian(self, theta_RK: np.ndarray, z_RTM: np.ndarray) -> np.ndarray:
        """Its derivatives, [R, M, K]."""
        limit_R1, terms_RTM, z_RTM = self._terms(theta_RK, z_RTM)
        total_RM = limit_R1 + terms_RTM.sum(axis=1)
        columns = [np.ones_like(total_RM)]
        for i in range(z_RTM.shape[1]):
            columns += [terms_RTM[:, i], -z_RTM[:, i] * terms_RTM[:, i]]
        if self.name == "shifted_limit":
            slope_RM = np.exp(theta_RK[:, 3:] - z_RTM[:, 0])  # dz/db, of z = log(exp(c) + exp(b))
            columns.append(-theta_RK[:, 2:3] * terms_RTM[:, 0] * slope_RM)
        return np.stack(columns, axis=2) / total_RM[..., None]

    def bounds(self, least_R: np.ndarray, limit: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper, [R, K]; without `limit`, E is held at zero."""
        terms = 2 if self.name == "chinchilla" else 1
        shift = [self.shift_range] if self.name == "shifted_limit" else []
        low, high = np.array([(0.0, 0.0), *[(-_AMPLITUDE, _AMPLITUDE), _EXPONENTS] * terms, *shift]).T
        lower_RK, upper_RK = np.tile(low, (len(least_R), 1)), np.tile(high, (len(least_R), 1))
        if limit:
            upper_RK[:, 0] = _BELOW_LEAST * least_R
        return lower_RK, upper_RK

    def figures(self, theta_RK: np.ndarray) -> dict[str, np.ndarray]:
        """What the law says, [R] each: error = coefficient C^-exponent + limit, for chinchilla at the best N and D."""
        limit, a, alpha = theta_RK.T[:3]
        at_n, at_d = self.origin
        if self.name != "chinchilla":
            shown = {"coefficient": np.exp(a + alpha * (at_n + at_d)), "exponent": alpha, "limit": limit}
            return shown | ({"shift": np.exp(theta_RK[:, 3] + at_n + at_d)} if self.name == "shifted_limit" else {})
        b, beta = theta_RK.T[3:]
        log_size, log_samples = a + alpha * at_n, b + beta * at_d
        log_best = (np.log(alpha) + log_size - np.log(beta) - log_samples) / (alpha + beta)  # of N at C = 1
        return {
            "coefficient": np.exp(log_size - alpha * log_best) + np.exp(log_samples + beta * log_best),
            "exponent": alpha * beta / (alpha + beta),
            "limit": limit,
            "size_coefficient": np.exp(log_size),
            "size_exponent": alpha,
            "samples_coefficient": np.exp(log_samples),
            "samples_exponent": beta,
            "best_gmacs_coefficient": np.exp(log_best),
            "best_gmacs_exponent": beta / (alpha + beta),
        }

    def _terms(self, theta_RK: np.ndarray, z_RTM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.name == "shifted_limit":
            z_RTM = np.logaddexp(z_RTM, theta_RK[:, 3, None, None])
        terms = [np.exp(theta_RK[:, 1 + 2 * i, None] - theta_RK[:, 2 + 2 * i, None] * z_RTM[:, i])
                 for i in range(z_RTM.shape[1])]  # fmt: skip
        return theta_RK[:, :1], np.stack(terms, axis=1), z_RTM


def fit_one(form: Form, runs: Selection, limit: bool = True) -> tuple[np.ndarray, float]:
    """The parameters [1, K] for the one resample that `runs` has, and the bound of Huber's loss.

    Variable projection from many starts: for each pair of exponents the linear coefficients are the solution of a
    non-negative least-squares problem in the relative error. The best of them are polished. Without `limit`, E is 0.
    """
    if form.name == "power":
        return _fit_line(form, runs), np.inf
    kept = runs.weight[0] > 0
    z_TM, error_M = form.coordinates(runs)[0][:, kept], np.exp(runs.error[0][kept])
    starts = sorted((_project(form, z_TM, error_M, grid, limit) for grid in _grid(form)), key=lambda pair: pair[0])
    theta_SK = np.array([theta for _, theta in starts[:_NUM_STARTS]])
    repeated = runs.rows(np.zeros(len(theta_SK), int))
    theta_SK, loss_S = _polish(form, theta_SK, repeated, np.inf, limit)
    residual = (form.log_error(theta_SK[[loss_S.argmin()]], z_TM[None]) - runs.error[:, kept])[0]
    huber = max(_LEAST_HUBER, _HUBER_DEVIATIONS * _MAD_TO_DEVIATION * float(np.median(np.abs(residual))))
    theta_SK, loss_S = _polish(form, theta_SK, repeated, huber, limit)
    return theta_SK[[loss_S.argmin()]], huber


def fit_many(form: Form, runs: Selection, start: np.ndarray, huber: float) -> np.ndarray:
    """The parameters [R, K] of every resample, from one start [1, K] or its own [R, K]; NaN where one has too few
    different runs to carry them, or starts there.
    """
    if form.name == "power":
        theta_RK = _fit_line(form, runs)
    else:
        theta_RK, _ = _polish(form, np.broadcast_to(start, (len(runs.error), start.shape[1])), runs, huber)
    theta_RK[_num_different(runs) < form.num_parameters] = np.nan
    return theta_RK


def _fit_line(form: Form, runs: Selection) -> np.ndarray:
    """Least squares in log-log, in closed form."""
    z_RM, w_RM = form.coordinates(runs)[:, 0], runs.weight
    total_R1 = w_RM.sum(axis=1, keepdims=True)
    z_mean, y_mean = ((w_RM * v).sum(axis=1, keepdims=True) / total_R1 for v in (z_RM, runs.error))
    with np.errstate(invalid="ignore", divide="ignore"):
        slope_R = (w_RM * (z_RM - z_mean) * runs.error).sum(axis=1) / (w_RM * (z_RM - z_mean) ** 2).sum(axis=1)
    return np.stack([np.zeros_like(slope_R), y_mean[:, 0] - slope_R * z_mean[:, 0], -slope_R], axis=1)


def _grid(form: Form) -> list[tuple[float, ...]]:
    """Exponents, and shifts, to start from."""
    if form.name == "chinchilla":
        return list(product(_START_EXPONENTS, repeat=2))
    shifts = np.linspace(*form.shift_range, 8) if form.name == "shifted_limit" else [-np.inf]
    return list(product(_START_EXPONENTS, shifts))


def _project(
    form: Form, z_TM: np.ndarray, error_M: np.ndarray, grid: tuple[float, ...], limit: bool
) -> tuple[float, np.ndarray]:
    """Misfit and parameters [K] of the best linear coefficients for these exponents and this shift."""
    two = form.name == "chinchilla"
    exponents = grid if two else grid[:1]
    if not two:
        z_TM = np.logaddexp(z_TM, grid[1])
    columns = [np.full_like(error_M, float(limit)), *(np.exp(-e * z) for e, z in zip(exponents, z_TM, strict=True))]
    linear, misfit = nnls(np.stack(columns, axis=1) / error_M[:, None], np.ones_like(error_M))
    theta = [min(linear[0], _BELOW_LEAST * error_M.min())]
    for amplitude, exponent in zip(linear[1:], exponents, strict=True):
        theta += [np.log(max(amplitude, 1e-9)), exponent]
    return misfit, np.array([*theta, *(grid[1:] if form.name == "shifted_limit" else ())])


def _polish(
    form: Form, theta_RK: np.ndarray, runs: Selection, huber: float, limit: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's method within bounds, for all resamples at once: parameters [R, K] and losses [R]."""
    z_RTM = form.coordinates(runs)
    least_R = np.exp(np.where(runs.weight > 0, runs.error, np.inf).min(axis=1))
    lower_RK, upper_RK = form.bounds(least_R, limit)
    theta_RK = np.clip(theta_RK, lower_RK, upper_RK)
    loss_R = _loss(form, theta_RK, z_RTM, runs, huber)
    damping_R = np.full(len(theta_RK), 1e-2)
    active = np.arange(len(theta_RK))
    for _ in range(_NUM_STEPS):
        part, z = runs.rows(active), z_RTM[active]
        step = _step(form, theta_RK[active], z, part, huber, damping_R[active], lower_RK[active], upper_RK[active])
        tried = np.clip(theta_RK[active] + step, lower_RK[active], upper_RK[active])
        loss = _loss(form, tried, z, part, huber)
        gain = loss_R[active] - loss
        better = gain > 0
        theta_RK[active[better]], loss_R[active[better]] = tried[better], loss[better]
        damping_R[active] = np.clip(damping_R[active] * np.where(better, 0.2, 5), 1e-12, None)
        done = np.where(better, gain < 1e-10 * loss + 1e-20, damping_R[active] > 1e8)
        active = active[~done]
        if not len(active):
            break
    return theta_RK, loss_R


def _loss(form: Form, theta_RK: np.ndarray, z_RTM: np.ndarray, runs: Selection, huber: float) -> np.ndarray:
    distance = np.abs(form.log_error(theta_RK, z_RTM) - runs.error)
    near = np.minimum(distance, huber)
    return (runs.weight * near * (distance - near / 2)).sum(axis=1)


def _step(
    form: Form, theta_RK: np.ndarray, z_RTM: np.ndarray, runs: Selection, huber: float, damping_R: np.ndarray,
    lower_RK: np.ndarray, upper_RK: np.ndarray,
) -> np.ndarray:  # fmt: skip
    residual_RM = form.log_error(theta_RK, z_RTM) - runs.error
    jacobian_RMK = form.jacobian(theta_RK, z_RTM)
    weight_RM = runs.weight * np.minimum(1, huber / np.maximum(np.abs(residual_RM), 1e-300))
    weighted_RKM = (jacobian_RMK * weight_RM[..., None]).swapaxes(1, 2)
    gradient_RK = (weighted_RKM @ residual_RM[..., None])[..., 0]
    curvature_RKK = weighted_RKM @ jacobian_RMK
    # A parameter at its bound that wants to go beyond it is no parameter in this step.
    free_RK = ~((theta_RK <= lower_RK) & (gradient_RK > 0) | (theta_RK >= upper_RK) & (gradient_RK < 0))
    curvature_RKK = curvature_RKK * free_RK[:, :, None] * free_RK[:, None, :]
    diagonal_RK = np.diagonal(curvature_RKK, axis1=1, axis2=2)
    extra_RK = damping_R[:, None] * diagonal_RK + 1e-12 + ~free_RK
    curvature_RKK = curvature_RKK + extra_RK[:, :, None] * np.eye(theta_RK.shape[1])
    return -np.linalg.solve(curvature_RKK, (gradient_RK * free_RK)[..., None])[..., 0]


def _num_different(runs: Selection) -> np.ndarray:
    """How many different runs each resample holds, [R]."""
    run_RM = np.sort(np.where(runs.weight > 0, runs.run, -1), axis=1)
    changes = (np.diff(run_RM, axis=1, prepend=-1) > 0) & (run_RM >= 0)
    return changes.sum(axis=1)
