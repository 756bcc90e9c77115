"""The statistics of the report: when a curve reaches a value, pairs of one seed, spread over seeds."""

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of one number over seeds.

    Attributes:
        count: of seeds.
        deviation: the sample's standard deviation (n - 1); None of fewer than two.
    """

    count: int
    mean: float
    deviation: float | None
    low: float
    high: float


def spread(values: Collection[float]) -> Spread | None:
    """The spread of the values; None where there are none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(len(values), statistics.fmean(values), deviation, min(values), max(values))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> dict[int, float]:
    """{seed: value - base} of the seeds that both have, in order."""
    return {seed: values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())}


def pooled_deviation(groups: Collection[Collection[float]]) -> float | None:
    """The standard deviation within groups that may differ in their means, each of several runs.

    None where no group has two values.
    """
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    squares = sum((len(group) - 1) * statistics.variance(group) for group in groups)
    return math.sqrt(squares / sum(len(group) - 1 for group in groups))


def first_reach(
    curve: Mapping[int, float], target: float, lower_is_better: bool = True
) -> float | None:
    """The step at which a curve is first as good as the target; None if it never is.

    Linear between the steps of the curve. Where it is as good from the beginning, its first step: the
    true one may be earlier.
    """
    before = None
    for step in sorted(curve):
        short = curve[step] - target if lower_is_better else target - curve[step]
        if short <= 0:
            if before is None:
                return float(step)
            last_step, last_short = before
            return last_step + (step - last_step) * (last_short / (last_short - short))
        before = step, short
    return None


def median(values: Sequence[float | None]) -> float | None:
    """The median where None, "not reached", is below every number."""
    middle = statistics.median(-math.inf if v is None else v for v in values)
    return None if middle == -math.inf else middle


def ordered(values: Collection[float | None]) -> list[float | None]:
    """From lowest to highest; None is below every number."""
    return sorted(values, key=lambda v: -math.inf if v is None else v)


def chance_beyond(deviations: float) -> float:
    """How often two independent draws of one normal distribution are further apart than that."""
    return math.erfc(deviations / 2)
