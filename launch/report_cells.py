"""Cells of the report's tables."""

import math
import urllib.parse
from collections.abc import Collection, Iterable, Mapping

from launch import speedup, study
from launch.collected import Results
from launch.study import Measure

NOT_RUN = "not run"

_LABELS = {s: text for asked in study.QUESTIONS for s, text in asked.settings.items()}
_LABELS |= study.VARIANTS


def label(setting: str) -> str:
    """What a setting is called."""
    return _LABELS.get(setting, setting.partition("/")[2])


def seeds(results: Results, setting: str, only: Collection[int] | None = None) -> str:
    """Its assessed seeds (of those in `only`), each a link to its files; or that there are none."""
    assessed = {seed for m in study.MEASURES for seed in results.finals(setting, m.key)}
    links = [
        f"[{seed}](runs/{run.sweep}/{urllib.parse.quote(run.name, safe='=+')})"
        for seed, run in sorted(results.seeds(setting).items())
        if seed in assessed and (only is None or seed in only)
    ]
    return ", ".join(links) or NOT_RUN


def mean(measure: Measure, values: Mapping[int, float]) -> str:
    """The mean over seeds."""
    spread = speedup.spread(values.values())
    return NOT_RUN if spread is None else measure.shown(spread.mean)


def plus_minus(measure: Measure, values: Mapping[int, float]) -> str:
    """Mean and standard deviation over seeds; of one seed the value alone."""
    spread = speedup.spread(values.values())
    if spread is None:
        return NOT_RUN
    deviation = "" if spread.deviation is None else f" ± {measure.shown(spread.deviation)}"
    return measure.shown(spread.mean) + deviation


def verdict(measure: Measure, differences: Mapping[int, float], noise: float | None) -> bool | None:
    """Whether the mean difference is for the better (True) or the worse (False) beyond the noise.

    None: within it, or there is no yardstick. The yardstick for a mean over n seeds is smaller by the
    root of n.
    """
    spread = speedup.spread(differences.values())
    if spread is None or noise is None:
        return None
    if abs(spread.mean) <= study.YARDSTICK * noise / math.sqrt(spread.count):
        return None
    return measure.better(spread.mean)


def difference(measure: Measure, differences: Mapping[int, float], noise: float | None) -> str:
    """The mean difference (lowest to highest); bold, with "better" or "worse", beyond the noise.

    Args:
        measure: of what.
        differences: one a seed.
        noise: the standard deviation over seeds.
    """
    spread = speedup.spread(differences.values())
    if spread is None:
        return NOT_RUN
    text = measure.signed(spread.mean)
    good = verdict(measure, differences, noise)
    if good is not None:
        text = f"**{text}** {'better' if good else 'worse'}"
    if spread.count > 1:
        text += f" ({measure.signed(spread.low)} to {measure.signed(spread.high)})"
    return text


def noises(results: Results, measures: Iterable[Measure] = study.MEASURES) -> str:
    """The yardstick of each measure that has one."""
    found = [
        f"{m.name} {m.shown(noise)}{'%' if m.scale == 100 else ''}"
        for m in measures
        if (noise := results.noise(m)) is not None
    ]
    return "; ".join(found)


def against(results: Results, setting: str, base: str, measure: Measure) -> dict[int, float]:
    """{seed: difference of the final values} of the seeds that both have."""
    finals = results.finals(setting, measure.key)
    return speedup.paired(finals, results.finals(base, measure.key))
