"""A mean and how sure it is."""

import math
from collections.abc import Sequence

from attrs import frozen

from kvframe.errors import ConfigError


@frozen(kw_only=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    """With `low` infinitely far away where there is one value only."""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean of independent values, such as the scores of several seeds.

    Raises ConfigError for no value, and where scipy is not installed.
    """
    if not values:
        raise ConfigError("a mean needs at least one value, got none")
    count, mean = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    reach = _t_quantile((1 + confidence) / 2, count - 1) * error
    return Interval(mean=mean, low=mean - reach, high=mean + reach)


def _t_quantile(share: float, degrees: int) -> float:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ConfigError("confidence intervals need scipy; pip install 'kvframe[eval]'") from error
    return float(t.ppf(share, degrees))
