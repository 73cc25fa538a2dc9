"""Means over seeds, and paired differences between arms."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05  # of significance; intervals have 1 - LEVEL


class Mean(NamedTuple):
    """A mean over n seeds with Student's 95% interval; NaN where there are too few for one."""

    value: float
    low: float
    high: float
    n: int


class Difference(NamedTuple):
    """A paired difference: mean with interval, p of the paired t-test (two-sided), n seeds."""

    value: float
    low: float
    high: float
    n: int
    p: float


def mean(values: Sequence[float]) -> Mean:
    """The mean of what is finite."""
    x = np.array(values, np.float64)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return Mean(float(x.mean()) if len(x) else math.nan, math.nan, math.nan, len(x))
    half = stats.t.ppf(1 - LEVEL / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return Mean(float(x.mean()), float(x.mean() - half), float(x.mean() + half), len(x))


def paired(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`values` less `baseline`, seed by seed: what a seed does to both cancels out.

    Student's t over the seeds; with five of them it sees only differences of about 1.6 standard
    deviations of a difference or more. Seeds that lack a value on either side are left out.
    """
    found = mean(np.subtract(values, baseline))
    if found.n < 2:
        return Difference(*found, math.nan)
    deviation = (found.high - found.value) / stats.t.ppf(1 - LEVEL / 2, found.n - 1)
    if deviation == 0:  # the same everywhere
        return Difference(*found, float(found.value == 0))
    p = 2 * stats.t.sf(abs(found.value) / deviation, found.n - 1)
    return Difference(*found, float(p))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of one family, adjusted by Holm's step-down procedure (1979). NaN stays NaN.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.array(p, np.float64)
    order = [i for i in np.argsort(p) if not math.isnan(p[i])]
    out, largest = p.copy(), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        out[i] = largest
    return out.tolist()
