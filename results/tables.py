"""Writes tables.md and the figures beside it from the files of runs/: `python results/tables.py`.

A run is runs/SWEEP/ARM-seed=N/, as `python -m launch.collect` copies it: assessment.jsonl has measures of samples (in
older runs the cross-entropy too), positions.jsonl the cross-entropy at each grid position, future.jsonl probes.
"""

import json
import pathlib

import matplotlib.figure
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy import stats

HERE, STEPS_PER_EPOCH = pathlib.Path(__file__).parent, 1_875  # 60,000 images, batches of 32
BASE, STUDY, FIRST, PLANNED = "llamagen", "study_direction", "variants", 5  # planned pairs
STAGES = (  # sweep, what it settles, runs
    ("study_rates", "the learning rate of each arm", 6),
    ("study_direction", "future against past: the primary test", 15),
    ("study_controls", "self-distillation; does it need the image", 6),
    ("study_static", "the EMA channel closed", 6),
    ("study_encoder", "is the encoder's knowledge of the future what helps", 6),
    ("study_tokens", "direction at four times the tokens", 3),
)
NAMES = {
    "llamagen": "LlamaGen", "mirai_e": "Mirai-E", "mirai_i": "Mirai-I", "mirai_e_i": "Mirai-E and I",
    "future": "Mirai-E (future)", "past": "E, offsets into the past",
    "past-only": "E, offsets into the past", "same-position": "E, the same position, weight 6",
    "shuffled-e": "E, states of another image", "early-e": "E from the first step on",
    "internal-1d": "E, next positions of the raster", "late-i": "I from epoch 0.3 on",
    "shuffled-i": "I, features of another image", "encoder-whole": "I, own encoder",
    "static-future": "finished teacher, future", "static-past": "finished teacher, past",
    "encoder-row": "I, own encoder, sees no later row",
}  # fmt: skip
VARIANTS = [(FIRST, arm) for arm in ("mirai_e", "mirai_i", "mirai_e_i")]
CONTRASTS = (  # of the first study, after 2,000 steps: arm less arm
    ("past-only", "mirai_e"), ("internal-1d", "mirai_e"), ("same-position", "mirai_e"),
    ("shuffled-e", "mirai_e"), ("mirai_i", "mirai_e"), ("mirai_i", "early-e"),
    ("late-i", "mirai_e"), ("shuffled-i", "mirai_i"), ("mirai_e_i", "mirai_i"),
)  # fmt: skip
MEASURES = {  # column: title, digits, factor
    "ema": ("cross-entropy, EMA", 4, 1), "trained": ("cross-entropy, trained weights", 4, 1),
    "frechet": ("Fréchet, EfficientNet-Lite0", 2, 1),
    "frechet_classifier": ("Fréchet, classifier", 4, 1), "class_accuracy": ("class accuracy, %", 1, 100),
}  # fmt: skip
AHEAD = {"r0c1": "next token", "r1c0": "one row below", "r2c0": "two rows below"}
OLD, RENAMED = {"cross_entropy": "validation_cross_entropy"}, ("agreement", "class_accuracy")
COLOURS, MARKERS = ("#000000", "#0072b2", "#d55e00", "#009e73"), "osD^v"
DASHES = ("-", "--", ":", "-.", (0, (1, 3)))
INTRODUCTION = """# Tables

Written by `python results/tables.py` from `runs/`; README.md says what was run. Differences are paired by seed: mean [95% t
interval]. **Bold**: the interval leaves out 0. That is no test: one of twenty such intervals does so by chance. Lower is better
for all measures but class accuracy. Fréchet distances are no FIDs, and have a floor: that of as many real images through the
tokenizer. *Classifier*: decision values of the support-vector machine that also gives the class accuracy; it teaches nobody.

## The primary test

Cross-entropy of the EMA weights on held-out images at the last step, paired by seed. All other numbers are exploratory.

"""
SPEED = """LlamaGen's steps over the arm's to a cross-entropy (EMA), same seed, linear between assessed steps; empty where a seed does
not pass it after the first of these. No goal is the end of a shorter run.\n\n"""


def measured(path, about, protocols):
    """The measurements of a run, made as all of its sweep: in the study the sampling seed is the run's."""
    for entry in map(json.loads, path.read_text().splitlines() if path.exists() else ()):
        how = dict(entry["protocol"])
        if "seed" in how and about["sweep"].startswith("study"):
            how["seed"] -= about["seed"]
        if protocols.setdefault((about["sweep"], path.name, how.get("guidance")), how) != how:
            raise ValueError(f"{path} has numbers of another protocol than its sweep")
        yield entry


def read(runs):
    """A row for each run, step and guidance: cross-entropies, and measures of samples where there are."""
    rows, protocols = [], {}
    for path in sorted(runs.glob("*/*/run.json")):
        run, config = (json.loads(p.read_text()) for p in (path, path.with_name("config.json")))
        about = {"sweep": path.parts[-3], "arm": run["setting"], "seed": config["seed"]}
        about |= {k: run.get(k, "unknown") for k in ("seconds", "machine", "commit")}
        about |= {"last": run["steps"], "ema": np.nan, "grid": None}
        about["start"] = max([t["start_epoch"] for t in config["foresight"]] or [0.0])
        for entry in measured(path.with_name("future.jsonl"), about, protocols):
            blocks = [block["tokens"]["r2"] for block in entry["ema"].values()]  # the best counts
            about |= {target: max(block[target] for block in blocks) for target in AHEAD}
        found = {(run["steps"], 1.0): {}}
        for entry in measured(path.with_name("positions.jsonl"), about, protocols):
            row = found[entry["step"], 1.0] = {"grid": np.array(entry["ema"])}
            row |= {weights: np.mean(entry[weights]) for weights in ("ema", "trained")}
        for entry in measured(path.with_name("assessment.jsonl"), about, protocols):
            entry = {OLD.get(k, k).replace(*RENAMED): v for k, v in entry.items()}
            row = found.setdefault((entry["step"], entry["protocol"]["guidance"]), {})
            row.setdefault("ema", entry["validation_cross_entropy"])
            row |= {k: v for k, v in entry.items() if k.removeprefix("real_") in MEASURES}
        rows += [{**about, "step": s, "guidance": g, **row} for (s, g), row in found.items()]
    columns = dict.fromkeys([*rows[0], *MEASURES, *(f"real_{m}" for m in MEASURES), *AHEAD])
    return pd.DataFrame(rows, columns=list(columns)).sort_values(["sweep", "arm", "seed", "step"])


def of(data, sweep, arm, step=None, guidance=1.0):
    """The rows of an arm, by seed, at a step (None: the runs' last)."""
    some = data[(data.sweep == sweep) & (data.arm == arm) & (data.guidance == guidance)]
    return some[some.step == (some["last"] if step is None else step)].set_index("seed")


def curves(data, sweep, arm, measure="ema"):
    """A measure without guidance: rows are steps, columns seeds."""
    some = data[(data.sweep == sweep) & (data.arm == arm) & (data.guidance == 1)]
    return some.dropna(subset=[measure]).pivot(index="step", columns="seed", values=measure)


def arms_of(data, *sweeps):
    some = data[data.sweep.isin(sweeps) & (data.arm != BASE)]
    return list(some[["sweep", "arm"]].drop_duplicates().itertuples(index=False, name=None))


def interval(values):
    """Mean and half width of the 95% t interval (nan of fewer than two values)."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return (values.mean() if len(values) else np.nan), np.nan
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def paired(arm, base, measure):
    """Differences of the seeds that both have."""
    return (arm[measure] - base[measure]).dropna().astype(float)


def reach(curve, goal):
    """The step at which a falling curve first is at the goal, linear in between; nan: not in it."""
    curve = curve.dropna()
    below = np.flatnonzero(curve <= goal)
    if not len(below) or below[0] == 0:
        return np.nan
    (x0, y0), (x1, y1) = list(curve.items())[below[0] - 1 : below[0] + 1]
    return x0 + (y0 - goal) / (y0 - y1) * (x1 - x0)


def speed_ups(data, sweep, arm):
    """Rows are goals, a hundredth of a nat apart; columns seeds."""
    base, mine = curves(data, sweep, BASE), curves(data, sweep, arm)
    seeds = [seed for seed in base if seed in mine]
    goals = [goal / 100 for goal in range(134, 90, -1)]
    found = {s: [reach(base[s], goal) / reach(mine[s], goal) for goal in goals] for s in seeds}
    return pd.DataFrame(found, index=goals).dropna(how="all")


def markdown(titles, rows):
    made = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in made) + "\n"


def number(value, digits, sign=""):
    return f"{value:{sign}.{digits}f}".replace("-", "−")


def level(values, measure):
    """Mean ± standard deviation over seeds."""
    _, digits, factor = MEASURES[measure]
    values = values.dropna() * factor
    spread = f" ± {number(values.std(), digits)}" if len(values) > 1 else ""
    return number(values.mean(), digits) + spread if len(values) else "not run"


def difference(values, measure, seeds=0):
    """Mean [95% t interval], bold where it leaves out 0; their number where fewer than `seeds` are paired."""
    _, digits, factor = MEASURES[measure]
    mean, half = interval(values * factor)
    if np.isnan(half):
        return "not run" if np.isnan(mean) else f"{number(mean, digits, '+')} (1 seed)"
    text, low, high = (number(v, digits, "+") for v in (mean, mean - half, mean + half))
    text = f"**{text}**" if abs(mean) > half else text
    return f"{text} [{low}, {high}]" + f" ({len(values)} seeds)" * (len(values) < seeds)


def compared(data, arms, base, step=None, guidance=1.0, measures=tuple(MEASURES)):
    """Each arm beside the base: levels and paired differences; the floors in the last row."""
    rows = of(data, *base, step, guidance)
    used = [m for m in measures if rows[m].notna().any()]
    titles, body, floors = ["arm", "seeds"], [], ["real images through the tokenizer", ""]
    for measure in used:
        titles += [MEASURES[measure][0], f"− {NAMES[BASE]}"]
        real = rows[f"real_{measure}"].drop_duplicates()
        floors += [level(real.head(1), measure) if real.notna().any() else "", ""]
    for arm in (base, *arms):
        mine = of(data, *arm, step, guidance)
        cells = [NAMES.get(arm[1], arm[1]), len(mine)]
        for m in used:
            cells += [level(mine[m], m), difference(paired(mine, rows, m), m, len(mine))]
        body.append(cells)
    body[0][3::2] = [""] * len(used)
    return markdown(titles, body + [floors] * any(floors[1:])) if used else "Not run.\n\n"


def primary(data):
    future, past = of(data, STUDY, "future"), of(data, STUDY, "past")
    found = paired(future, past, "ema")
    if len(found) < PLANNED:
        return f"**Not run yet**: {len(found)} of {PLANNED} pairs are finished, so no test is made.\n\n"
    p = stats.ttest_rel(future.ema[found.index], past.ema[found.index]).pvalue
    verdict = "undecided" if p >= 0.05 else "future lower" if found.mean() < 0 else "past lower"
    return f"Future − past: {difference(found, 'ema')}, p = {p:.2g}, {len(found)} seeds: {verdict}.\n\n"


def speed_table(data, sweep, arms):
    found = {NAMES[arm]: speed_ups(data, sweep, arm) for arm in arms}
    rows = []
    for goal in sorted(set().union(*(table.index for table in found.values())))[::-2]:
        cells = [f"{goal:.2f}"]
        for table in found.values():
            mean, half = interval(table.loc[goal] if goal in table.index else [])
            ends = "" if np.isnan(half) else f" [{mean - half:.2f}, {mean + half:.2f}]"
            cells.append("" if np.isnan(mean) else f"{mean:.2f}{ends}")
        rows.append(cells)
    return SPEED + (markdown(["cross-entropy", *found], rows) if rows else "Not run.\n\n")


def grid_table(data):
    """Cross-entropy of the EMA by row and column, and differences to the baseline of the same seed."""
    rows, base = [], of(data, STUDY, BASE).grid.dropna()
    for arm in (BASE, "future", "past"):
        mine = of(data, STUDY, arm).grid.dropna()
        less, sign = ({}, "") if arm == BASE else (base, "+")
        found = [mine[seed] - less.get(seed, 0) for seed in mine.index if seed in base]
        title = NAMES[arm] + (f" − {NAMES[BASE]}" if sign else "")
        for axis, name in ((1, "row"), (0, "column")) if found else ():
            values = [number(value, 4, sign) for value in np.mean(found, axis=0).mean(axis)]
            rows.append([f"{title}, by {name}", len(found), *values])
    return markdown(["", "seeds", *range(1, 9)], rows) if rows else "Not run.\n\n"


def tables(data):
    """The text of tables.md."""
    last = data[data.step == data["last"]].drop_duplicates(["sweep", "arm", "seed"])
    text = INTRODUCTION + primary(data) + "## The study\n\n"
    text += "Fashion-MNIST, 8x8 tokens, 1.1 M parameters, 6 epochs (11,250 steps of 32), cosine to zero.\n\n"
    rows = [[f"`{s}.py`", what, f"{sum(last.sweep == s)} of {runs}"] for s, what, runs in STAGES]
    text += markdown(["stages 0 to 5", "what it settles", "runs finished"], rows)
    text += "### Stage 0: learning rates, 2 epochs, one seed\n\n"
    rates = last[last.sweep == "study_rates"]
    rows = [[r.arm, number(r.ema, 4), number(r.frechet, 2)] for r in rates.itertuples()]
    text += markdown(["arm", "cross-entropy, EMA", "Fréchet"], rows)
    arms = [(STUDY, "future"), (STUDY, "past"), *arms_of(data, *(s[0] for s in STAGES[2:5]))]
    text += "### Stages 1 to 4, last step\n\n" + compared(data, arms, (STUDY, BASE))
    guided = None, 2.0, [*MEASURES][2:]
    text += "### With guidance 2\n\n" + compared(data, arms, (STUDY, BASE), *guided)
    text += "### Stage 5, last step\n\n"
    text += compared(data, arms_of(data, "study_tokens"), ("study_tokens", BASE))
    text += "### By row and column of the grid, stage 1\n\n" + grid_table(data)
    text += "### Speed-up, stage 1\n\n" + speed_table(data, STUDY, ["future", "past"])
    text += "## The first study\n\n1.6 epochs at a constant learning rate; one sampling seed for all runs.\n\n"
    text += "### After 3,000 steps\n\n" + compared(data, VARIANTS, (FIRST, BASE))
    text += "### Speed-up\n\n" + speed_table(data, FIRST, [arm for _, arm in VARIANTS])
    bench = json.loads((HERE / "bench.json").read_text())["variants"]
    times = pd.DataFrame({NAMES[name]: found["step_seconds"] for name, found in bench.items()})
    ratios = times.div(times[NAMES[BASE]], axis=0).median()
    rows = [[name, f"{times[name].median() * 1000:.0f}", f"{ratios[name]:.2f}"] for name in times]
    text += "### Time of a step, alone on two CPU cores (bench.json)\n\n"
    text += markdown(["variant", "ms", f"over {NAMES[BASE]}'s"], rows)
    for sweep in ("controls", "diagnostics", "teachers", "neighbours"):
        text += f"### `{sweep}.py`, after 2,000 steps\n\n"
        arms = [*(VARIANTS if sweep == "controls" else []), *arms_of(data, sweep)]
        text += compared(data, arms, (sweep if sweep == "neighbours" else FIRST, BASE), 2000)
    text += "### Arm against arm, three seeds, after 2,000 steps\n\n"
    rows, measures = [], ("ema", "frechet", "class_accuracy")
    for arms in CONTRASTS:
        pair = [of(data, "controls" if "-" in arm else FIRST, arm, 2000) for arm in arms]
        cells = (difference(paired(*pair, measure), measure) for measure in measures)
        rows.append([" − ".join(NAMES[arm] for arm in arms), *cells])
    text += markdown(["", *(MEASURES[m][0] for m in measures)], rows)
    text += "### What states know of tokens to come: R² in the best block, mean over seeds\n\n"
    found = last.dropna(subset=[*AHEAD]).groupby(["sweep", "arm"])[[*AHEAD]].mean()
    rows = [["/".join(name), *(number(v, 3) for v in row)] for name, row in found.iterrows()]
    text += markdown(["runs", *AHEAD.values()], rows) + "## Time, machines, commits\n\n"
    groups = [*last.groupby(["sweep", "machine", "commit"]), (("all", "", ""), last)]
    timed = lambda seconds: [seconds.count(), f"{seconds.sum() / 3600:.1f}"]
    rows = [[a, len(g), *timed(g.seconds), *more] for (a, *more), g in groups]
    return text + markdown(["sweep", "runs", "timed", "hours", "machine", "commit"], rows)[:-1]


def draw(axis, table, colour):
    """A thin line a seed (rows of the table are x), their mean, and its 95% t interval."""
    for seed in table:
        axis.plot(table.index, table[seed], color=colour, lw=0.8, ls=DASHES[seed], alpha=0.6)
    whole = table.dropna()
    if len(whole) and table.shape[1] > 1:
        means, halves = np.array([interval(row) for row in whole.to_numpy()]).T
        axis.plot(whole.index, means, color=colour, lw=2)
        axis.fill_between(whole.index, means - halves, means + halves, fc=colour, alpha=0.15, lw=0)


def frechet_panel(axis, rows, start):
    floor, ends = rows.real_frechet.mean(), axis.get_yaxis_transform()
    axis.axhline(floor, color="black", lw=1)
    axis.axvline(start, color="grey", ls=":")
    text = "floor: real images through the tokenizer"
    axis.text(0.98, floor, text, ha="right", va="bottom", fontsize=8, transform=ends)
    axis.set(yscale="log", xlabel="step")
    ticks = (12, 15, 20, 30, 50, 100, 150)
    axis.set_yticks(ticks, labels=map(str, ticks))
    axis.set_yticks([], minor=True)
    axis.set_title("Fréchet distance (EfficientNet-Lite0, no FID)", fontsize=11)


def row_panel(axis, data, arms):
    base = of(data, STUDY, BASE).grid
    for colour, arm in zip(COLOURS[1:], arms, strict=False):
        found = (of(data, STUDY, arm).grid - base).items()
        table = pd.DataFrame({seed: grid.mean(1) for seed, grid in found}, range(1, 9))
        draw(axis, table.dropna(axis=1), colour)
    axis.axhline(0, color="black", lw=1)
    axis.set(xlabel="row of the token grid", ylabel="nats a token − LlamaGen's")
    axis.set_title("The same at the last step, by row", fontsize=11)


def curves_figure(data, sweep, arms, path):
    """Cross-entropy less the baseline's, Fréchet with its floor, and speed-ups over goals."""
    figure = matplotlib.figure.Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    some, base = data[data.sweep == sweep], curves(data, sweep, BASE)
    for colour, arm in zip(COLOURS, (BASE, *arms), strict=False):
        if sweep != STUDY:
            draw(middle, curves(data, sweep, arm, "frechet"), colour)
        if arm != BASE:
            draw(left, (curves(data, sweep, arm) - base).dropna(axis=1, how="all"), colour)
            draw(right, speed_ups(data, sweep, arm), colour)
    start = some[some.arm == arms[0]].start.max() * STEPS_PER_EPOCH
    begin = left.axvline(start, color="grey", ls=":", label=f"Mirai-E starts (step {start:.0f})")
    left.set(xlabel="step", ylabel="nats a token − LlamaGen's")
    left.set_title("Held-out cross-entropy (below 0 is better)", fontsize=11)
    row_panel(middle, data, arms) if sweep == STUDY else frechet_panel(middle, some, start)
    for axis, none in ((left, 0), (right, 1)):
        axis.axhline(none, color="black", lw=1)
    right.invert_xaxis()
    right.xaxis.set_major_locator(matplotlib.ticker.MultipleLocator(0.04))
    right.xaxis.set_major_formatter("{x:.2f}")
    right.set(xlabel="cross-entropy to reach", ylabel="LlamaGen's steps / the arm's")
    right.set_title("Speed-up in steps (above 1 is better)", fontsize=11)
    names = zip(COLOURS, (BASE, *arms), strict=False)
    keys = [Line2D([], [], color=c, lw=2, label=f"{NAMES[arm]}, mean") for c, arm in names]
    keys += [Line2D([], [], color="grey", lw=0.8, ls=DASHES[s], label=f"seed {s}") for s in base]
    keys += [Patch(color="grey", alpha=0.3, lw=0, label="95% t interval of the mean"), begin]
    figure.legend(handles=keys, loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def differences_figure(data, groups, path):
    """Paired differences in cross-entropy to the baseline: a marker a seed, mean and 95% t interval."""
    rows, seeds = [], {}
    for title, arms, sweep, step in groups:
        base = of(data, sweep, BASE, step)
        found = [(NAMES.get(a[1], a[1]), paired(of(data, *a, step), base, "ema")) for a in arms]
        found = [(name, values) for name, values in found if len(values) > 1]
        rows += [(title, None), *found] if found else []
    figure = matplotlib.figure.Figure((8.5, 1 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for y, (_, values) in enumerate(rows):
        if values is not None:
            mean, half = interval(values)
            axis.errorbar(mean, y, xerr=half, color=COLOURS[1], capsize=3, marker="|", ms=12)
            for seed, value in values.items():
                place = value, y - 0.2 - 0.09 * seed
                (seeds[seed],) = axis.plot(*place, MARKERS[seed], color=COLOURS[2], ms=4)
                seeds[seed].set_label(f"seed {seed}")
    keys = [seeds[seed] for seed in sorted(seeds)]
    keys += axis.plot([], [], color=COLOURS[1], label="mean and its 95% t interval")
    axis.axvline(0, color="black", lw=1)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    for label, (_, values) in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if values is None else "normal")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_xlabel("held-out cross-entropy − LlamaGen's, nats a token (below 0 is better)")
    figure.legend(handles=keys, fontsize=8, loc="outside upper center", ncols=len(keys))
    figure.savefig(path, dpi=110)


def write(out):
    """tables.md and the figures, in the folder `out`."""
    data = read(HERE / "runs")
    (out / "tables.md").write_text(tables(data))
    curves_figure(data, FIRST, [arm for _, arm in VARIANTS], out / "first.png")
    if len(paired(of(data, STUDY, "future"), of(data, STUDY, BASE), "ema")) > 1:
        curves_figure(data, STUDY, ["future", "past"], out / "study.png")
    groups = (
        ("Study, 11,250 steps", arms_of(data, *(s[0] for s in STAGES[1:5])), STUDY, None),
        ("First study, 3,000 steps", VARIANTS, FIRST, None),
        ("First study, 2,000 steps", VARIANTS, FIRST, 2000),
        ("its controls, 2,000 steps", arms_of(data, "controls"), FIRST, 2000),
    )
    differences_figure(data, groups, out / "differences.png")


if __name__ == "__main__":
    write(HERE)
