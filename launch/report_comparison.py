"""The main comparison: final values, differences, speed-up, and what a step costs."""

import statistics
from collections.abc import Collection, Mapping
from typing import Any

from launch import report_cells as cells
from launch import speedup, study
from launch.collected import Results, Run
from launch.study import Measure
from launch.tables import table

_NOT_REACHED = "not reached"
_OTHERS = [variant for variant in study.VARIANTS if variant != study.BASELINE]
_BASE = study.VARIANTS[study.BASELINE]


def _measures(results: Results) -> list[Measure]:
    """Those that are always shown, and more where they were measured."""
    more = [m for m in study.MORE_MEASURES if any(results.finals(v, m.key) for v in study.VARIANTS)]
    return [*study.MEASURES, *more]


def finals(results: Results) -> str:
    """Final values, and their differences to the baseline of the same seed."""
    measures = _measures(results)
    titles = [m.title for m in measures]
    values = [
        [study.VARIANTS[v], cells.seeds(results, v)]
        + [cells.plus_minus(m, results.finals(v, m.key)) for m in measures]
        for v in study.VARIANTS
    ]
    noise = {m.key: results.noise(m) for m in measures}
    differences = [
        [study.VARIANTS[v]]
        + [
            cells.difference(m, cells.against(results, v, study.BASELINE, m), noise[m.key])
            for m in measures
        ]
        for v in _OTHERS
    ]
    return (
        "At the last step, mean ± standard deviation over seeds:\n\n"
        + table(["variant", "seeds", *titles], values)
        + f"\nDifference to {_BASE} of the same seed, mean (lowest to highest):\n\n"
        + table(["variant", *titles], differences)
    )


def yardstick(results: Results) -> str:
    """How large noise is, and what that means."""
    found = cells.noises(results, _measures(results))
    if not found:
        return (
            "There is no yardstick for noise yet: it takes assessed runs of several seeds, so that no "
            "difference is called beyond the noise.\n"
        )
    passing = speedup.chance_beyond(study.YARDSTICK)
    return (
        "**The yardstick for noise** is the standard deviation over seeds of the main comparison, "
        f"pooled over its variants, at the step that is looked at; here: {found}. A difference in "
        f"**bold**, with its direction, is larger than {study.YARDSTICK:g} of them; for a mean over n "
        "seeds, larger than that divided by the root of n. This is a yardstick and not a test: the "
        "standard deviation itself comes from few runs, and of two single runs that differ in nothing "
        f"but independent noise of that size, {passing:.0%} of pairs would pass, so that among many "
        "comparisons some will.\n"
    )


def speed_ups(results: Results, variant: str, measure: str) -> dict[int, float | None]:
    """{seed: the baseline's last step over the step at which the variant is as good as that}.

    None where it never is. Seeds without both curves are left out.
    """
    targets = results.finals(study.BASELINE, measure)
    return _ratios(results, variant, measure, targets)


def _speed_ups_to_mean(results: Results, variant: str, measure: str) -> dict[int, float | None]:
    """The same, where the baseline's value is its mean over seeds."""
    finals = results.finals(study.BASELINE, measure)
    if not finals:
        return {}
    middle = statistics.fmean(finals.values())
    curves = results.curves(variant, measure)
    return _ratios(results, variant, measure, dict.fromkeys(curves, middle))


def _ratios(
    results: Results, variant: str, measure: str, targets: dict[int, float]
) -> dict[int, float | None]:
    last = _last_step(results)
    reached = _reached(results, variant, measure, targets)
    return {seed: None if step is None else last / step for seed, step in reached.items()}


def _last_step(results: Results) -> int:
    return max((run.steps for run in results.seeds(study.BASELINE).values()), default=0)


def _reached(
    results: Results, variant: str, measure: str, targets: Mapping[int, float]
) -> dict[int, float | None]:
    """{seed: the step at which the variant is as good as the seed's target}."""
    lower = next(m for m in study.MEASURES if m.key == measure).lower_is_better
    return {
        seed: speedup.first_reach(curve, targets[seed], lower)
        for seed, curve in results.curves(variant, measure).items()
        if seed in targets
    }


def _ratio(value: float | None) -> str:
    return _NOT_REACHED if value is None else f"{value:.2f}"


def _median(values: Collection[float | None]) -> str:
    """The median (lowest to highest)."""
    if not values:
        return cells.NOT_RUN
    ordered = speedup.ordered(values)
    if ordered[-1] is None:
        return _NOT_REACHED
    text = _ratio(speedup.median(ordered))
    return f"{text} ({_ratio(ordered[0])} to {_ratio(ordered[-1])})" if len(ordered) > 1 else text


def speed_up(results: Results) -> str:
    """How much earlier each variant is as good as the baseline in the end."""
    seeds = sorted({seed for v in study.VARIANTS for seed in results.seeds(v)})
    rows = []
    for measure in study.MEASURES:
        for variant, name in study.VARIANTS.items():
            own = speed_ups(results, variant, measure.key)
            rows.append(
                [
                    measure.name,
                    name,
                    *(_ratio(own[s]) if s in own else cells.NOT_RUN for s in seeds),
                    _median(own.values()),
                    _median(_speed_ups_to_mean(results, variant, measure.key).values()),
                ]
            )
    titles = [
        "measure", "variant", *(f"seed {s}" for s in seeds), "median (lowest to highest)",
        f"to {_BASE}'s mean over seeds",
    ]  # fmt: skip
    return (
        f"The last step of {_BASE} over the step at which a curve first is as good as {_BASE} of the "
        "same seed in the end. Between assessed steps a curve is taken as linear; one that is as good "
        "at its first assessed step counts with that step. Above 1 the variant needs fewer steps; "
        f'"{_NOT_REACHED}": it never is as good, and counts as the lowest.\n\n'
        + table(titles, rows)
        + f"\n{_BASE}'s own row is 1.00 where its curve improved up to the last step, more where it had "
        "been as good before. In the last column, a median (lowest to highest) too, the goal is its mean "
        "over seeds, so that its own row shows what the seed alone does.\n\n"
        "What is uncertain: each number rests on one crossing of a curve that was assessed at few "
        "steps, on samples of limited number. Where the baseline's curve is almost flat at its end, a "
        "small shift of it moves the crossing by hundreds of steps, and the first crossing of a noisy "
        "curve comes too early rather than too late. The range is that of the seeds, not a "
        "confidence interval; differences in the final value (above) are the steadier quantity.\n"
    )


def step_seconds(run: Run) -> float | None:
    """The median of its second half, in which every variant's foresight is on; None if not logged."""
    half = [entry for entry in run.metrics if entry["step"] > run.steps / 2]
    speeds = [entry["images_per_second"] for entry in half if "images_per_second" in entry]
    return run.batch_size / statistics.median(speeds) if speeds else None


def _step_times(results: Results, variant: str) -> dict[int, float]:
    found = {seed: step_seconds(run) for seed, run in results.seeds(variant).items()}
    return {seed: value for seed, value in found.items() if value is not None}


def _span(values: list[float], form: str) -> str:
    spread = speedup.spread(values)
    if spread is None:
        return cells.NOT_RUN
    text = format(spread.mean, form)
    if spread.count > 1:
        text += f" ({format(spread.low, form)} to {format(spread.high, form)})"
    return text


def times(results: Results) -> str:
    """What a step and a run take, beside the baseline's."""
    alone = results.bench.step_seconds if results.bench else {}
    rows = []
    for variant, name in study.VARIANTS.items():
        taken, rounds = alone.get(variant), _over_baseline(results, variant)
        runs = results.seeds(variant).values()
        minutes = [run.seconds / 60 for run in runs if run.seconds is not None]
        rows.append(
            [
                name,
                f"{1000 * statistics.median(taken):.0f}" if taken else cells.NOT_RUN,
                _median(rounds),
                *(
                    _median(speed_ups_in_time(results, variant, m.key).values())
                    for m in study.MEASURES
                ),
                _span([1000 * s for s in _step_times(results, variant).values()], ".0f"),
                _span(minutes, ".1f"),
            ]
        )
    titles = ["variant", "ms a step, alone", f"over {_BASE}'s"]
    titles += [f"speed-up in time, {m.name}" for m in study.MEASURES]
    titles += ["ms a step, in the runs", "minutes a run"]
    command = results.bench.command if results.bench else "python -m mirai_jax.bench --compare"
    return (
        f"A step alone on the machine is the median over the rounds of `{command}`, and so is the ratio "
        "(lowest to highest), which is taken within each round and is therefore no quotient of the "
        f"medians. Speed-up in time is what {_BASE}'s last step took over what the steps took that the "
        "variant needed to be as good (median, lowest to highest of the seeds), where a step costs the "
        "median ratio of the variant whose foresight was on in it: before it starts, foresight costs "
        "nothing. In the runs (mean, lowest to highest of the seeds) a "
        "step's time is the median of the second half, in which every variant's foresight is on, and a "
        "run's is all of its processes, with compiling and drawing: two runs shared the machine at "
        "once, with other work at times, so that they say little of the variants.\n\n"
        + table(titles, rows)
    )


def _over_baseline(results: Results, variant: str) -> list[float]:
    """How many times as long as the baseline's its step takes, one a round of the bench."""
    alone = results.bench.step_seconds if results.bench else {}
    if variant not in alone or study.BASELINE not in alone:
        return []
    return [a / b for a, b in zip(alone[variant], alone[study.BASELINE], strict=True)]


def speed_ups_in_time(results: Results, variant: str, measure: str) -> dict[int, float | None]:
    """{seed: the time of the baseline's last step over that at which the variant is as good}.

    None where it never is. Empty where what the variant's steps take was not measured.
    """
    costs = {
        _foresight(run.metrics[-1], every=True): statistics.median(rounds)
        for v in study.VARIANTS
        if (rounds := _over_baseline(results, v))
        for run in results.seeds(v).values()
        if run.metrics
    }
    targets, runs = results.finals(study.BASELINE, measure), results.seeds(variant)
    found: dict[int, float | None] = {}
    for seed, step in _reached(results, variant, measure, targets).items():
        cost = _cost(runs[seed], runs[seed].steps if step is None else step, costs)
        if cost is None:
            return {}
        found[seed] = None if step is None else _last_step(results) / cost
    return found


def _foresight(entry: Mapping[str, Any], every: bool = False) -> frozenset[str]:
    """The foresight losses that were on in a logged step; all that the run has with `every`."""
    return frozenset(k for k, v in entry.items() if k.startswith("foresight_") and (v or every))


def _cost(run: Run, step: float, costs: Mapping[frozenset[str], float]) -> float | None:
    """Of a run's steps up to this one, in steps of the baseline; None where it is not known.

    Args:
        run: whose logged steps tell which losses were on; one counts for all steps since the one before.
        step: where to end.
        costs: of a step, by the losses that are on.
    """
    cost, before = 0.0, 0
    for entry in run.metrics:
        if before >= step:
            break
        of_step = costs.get(_foresight(entry))
        if of_step is None:
            return None
        cost += of_step * (min(entry["step"], step) - before)
        before = entry["step"]
    return cost if before >= step else None
