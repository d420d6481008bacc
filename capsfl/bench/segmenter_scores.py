"""What the masks of several networks are worth: scores per case, means with intervals over seeds and cases."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from capsfl.learning.masks import dice, hd95_mm, volume_error_ml
from capsfl.learning.patients import Patient

GOAL_MARGIN = 0.01
"""SegCaps is to come this close to U-Net in Dice, or to surpass it."""
GOAL_RATIO = 20.0
"""U-Net is to have this many times as many parameters, or more."""
CONFIDENCE = 0.95

Scores = dict[str, list[float]]
"""`dice`, `hd95_mm` and `volume_error_ml` of every case, in the order of the cases."""


def score_masks(marked: Sequence[np.ndarray], cases: Sequence[Patient]) -> Scores:
    """Scores the `(z, y, x)` mask of every case; the surface of a single slice is its outline."""
    found: Scores = {"dice": [], "hd95_mm": [], "volume_error_ml": []}
    for mask, case in zip(marked, cases, strict=True):
        assert case.truth is not None
        found["dice"].append(dice(mask, case.truth))
        slices = (mask[0], case.truth[0]) if len(mask) == 1 else (mask, case.truth)
        found["hd95_mm"].append(hd95_mm(*slices, case.spacing_mm[-slices[0].ndim :]))
        found["volume_error_ml"].append(volume_error_ml(mask, case.truth, case.spacing_mm))
    return found


def crossed_interval(values: np.ndarray, *, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Returns an interval for the mean of `(seeds, cases)` values over seeds and cases not seen.

    Student's t on the variance of the seeds' means plus that of the cases' means, which errs on the wide side where
    both cross (Owen 2007, "The pigeonhole bootstrap"), degrees of freedom after Satterthwaite 1946. A bootstrap of
    three volumes would be far too narrow.

    Args:
        values: `(seeds, cases)`.
        confidence: probability with which the interval is to hold the mean.

    Returns:
        Low and high; None of one seed and one case. Of one seed the seeds' variance is left out, as of one case.
    """
    parts = [np.mean(values, axis=axis) for axis in (0, 1)]
    variances = [(np.var(part, ddof=1) / len(part), len(part) - 1) for part in parts if len(part) > 1]
    if not variances:
        return None
    total = sum(variance for variance, _ in variances)
    middle = float(np.mean(values))
    if not total:
        return middle, middle
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
    reach = float(stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(total))
    return middle - reach, middle + reach


def summarize(runs: Sequence[Scores]) -> dict[str, Any]:
    """Means over seeds and cases of one network's runs, one a seed; JSON-ready."""
    dices = np.array([run["dice"] for run in runs])
    errors = np.array([run["volume_error_ml"] for run in runs])
    distances = np.array([run["hd95_mm"] for run in runs])
    return {
        "dice": _mean_with_interval(dices, bounds=(0.0, 1.0)),
        "hd95_mm": _mean_with_interval(distances, bounds=(0.0, np.inf)),
        "absolute_volume_error_ml": _mean_with_interval(np.abs(errors), bounds=(0.0, np.inf)),
        "volume_error_ml": float(errors.mean()),
    }


def compare(runs: Mapping[str, Sequence[Scores]], parameters: Mapping[str, int], *, ours: str) -> list[dict[str, Any]]:
    """Compares one network with each other one, case by case and seed by seed.

    Args:
        runs: by network, the scores of every seed in the same order.
        parameters: by network.
        ours: the network that the others stand against.

    Returns:
        A row per other network: the difference in Dice, its interval, the other's parameters over ours.
    """
    if ours not in runs:
        return []
    dices = {name: np.array([run["dice"] for run in found]) for name, found in runs.items()}
    return [
        {
            "network": name,
            "difference": _mean_with_interval(dices[ours] - dices[name], bounds=(-1.0, 1.0)),
            "parameter_ratio": parameters[name] / parameters[ours],
        }
        for name in runs
        if name != ours
    ]


def judge_goal(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Holds the comparison with U-Net against the goal; None where it was not trained.

    `met` is about the mean; `shown` is whether the whole interval keeps the margin, which few cases seldom allow.
    """
    for row in rows:
        if row["network"] == "unet":
            found, small = row["difference"], row["parameter_ratio"] >= GOAL_RATIO
            low = found["low"]
            return {
                "margin": GOAL_MARGIN,
                "parameter_ratio": GOAL_RATIO,
                "met": bool(small and found["mean"] >= -GOAL_MARGIN),
                "shown": bool(small and low is not None and low >= -GOAL_MARGIN),
            }
    return None


def _mean_with_interval(values: np.ndarray, *, bounds: tuple[float, float]) -> dict[str, float | None]:
    found = crossed_interval(values)
    low, high = (None, None) if found is None else (max(found[0], bounds[0]), min(found[1], bounds[1]))
    return {"mean": float(values.mean()), "low": low, "high": high}
