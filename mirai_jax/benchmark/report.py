"""The numbers of a benchmark as a table for the screen and as a figure.

The table writes "not run" for missing numbers.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mirai_jax.benchmark.measure import median, paired_ratio
from mirai_jax.utils import pictures

PARTS = ("student", "teacher", "projectors", "optimizer")
_NOT_RUN = "not run"

Results = Mapping[str, Any]


def _time(values: Sequence[float] | None) -> str:
    if values is None:
        return _NOT_RUN
    seconds = median(values)
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _ratio(values: Sequence[float] | None, others: Sequence[float] | None) -> str:
    if values is None or others is None:
        return _NOT_RUN
    return f"{paired_ratio(values, others):.2f}"


def lines(results: Results) -> list[str]:
    """The table, and what is printed around it."""
    about = results["about"]
    config = about["generator"]
    cores = f", {about['cores']} cores" if about["platform"] == "cpu" and about["cores"] else ""
    head = [
        f"{about['scale']}: {config['num_layers']} layers of {config['width']}, "
        f"{config['grid'][0]}x{config['grid'][1]} tokens, {config['vocab_size']} codes; "
        f"batch {about['batch_size']}, {config['dtype']}, teachers {about['teacher_dtype']}, "
        f"remat {config['remat']}",
        f"{about['devices']} x {about['device']}{cores}; jax {about['versions']['jax']}",
        "",
    ]
    return [*head, *_table(results), *_sampler(results), *_input(results)]


def _table(results: Results) -> list[str]:
    variants, peak = results["variants"], results.get("roofs", {}).get("peak_flops")
    if not variants:
        return []
    columns = {name: _cells(results, name) for name in variants}
    titles = list(next(iter(columns.values())))
    wide, column = max(map(len, titles)), max(18, *(len(name) + 2 for name in columns))
    message = [" " * wide + "".join(f"{name:>{column}}" for name in columns)]
    for title in titles:
        cells = "".join(f"{cells[title]:>{column}}" for cells in columns.values())
        message.append(f"{title:<{wide}}{cells}")
    if peak:
        message.append(f"({peak / 1e12:,.3g} TFLOP/s {results['roofs']['peak_by']})")
    refused = results.get("peer_refused", {})
    return [*message, *(f"official PyTorch, {name}: {why}" for name, why in refused.items()), ""]


def _cells(results: Results, name: str) -> dict[str, str]:
    """A variant's column by the titles of its rows."""
    about, variants, found = results["about"], results["variants"], results["variants"][name]
    peak, peers = results.get("roofs", {}).get("peak_flops"), results.get("peer_seconds", {})
    step, theirs = found.get("step_seconds"), peers.get(f"step {name}")
    steps_per_second = 1 / median(step) if step else None
    operations, planned = sum(found["flops"].values()), found["plan"]["total"]
    tokens = about["batch_size"] * about["generator"]["grid"][0] * about["generator"]["grid"][1]

    def times(value: float | None, factor: float, form: str) -> str:
        return _NOT_RUN if value is None else form.format(value * factor)

    cells = {"train step": _time(step)}
    if "predicted_seconds" in found:
        low, high = (_time([seconds]) for seconds in found["predicted_seconds"])
        cells["  predicted"] = low if low == high else f"{low} .. {high}"
    if len(variants) > 1:
        cells["  over llamagen's"] = _ratio(step, variants.get("llamagen", {}).get("step_seconds"))
    if any("part_seconds" in other for other in variants.values()):
        parts = found.get("part_seconds", {})
        cells |= {f"  {x} alone": _time(parts[x]) if x in parts else "-" for x in PARTS}
    cells["images/s"] = times(steps_per_second, about["batch_size"], "{:,.1f}")
    cells["tokens/s"] = times(steps_per_second, tokens, "{:,.1f}")
    cells["TFLOP a step, formula"] = f"{operations / 1e12:.3f}"
    if peak:
        title = f"MFU of {peak / 1e12:,.3g} TFLOP/s"
        cells[title] = times(steps_per_second, operations / peak, "{:.1%}")
    cells["compile"] = _time([found["compile_seconds"]])
    cells["memory, planned"] = f"{planned / 2**30:.2f} GiB"
    cells["memory, at most in use"] = times(found.get("peak_bytes"), 2**-30, "{:.2f} GiB")
    cells["  over planned"] = times(found.get("peak_bytes"), 1 / planned, "{:.0%}")
    if peers or results.get("peer_refused"):
        cells["official PyTorch, step"] = _time(theirs)
        cells["  times its speed"] = _ratio(theirs, step)
    return cells


def sampler_share(results: Results) -> float | None:
    """The sampler's share of the memory roofline: bytes it must read over those that could be read."""
    found = results.get("sampler", {})
    if "seconds" not in found or "roofs" not in results:
        return None
    moved = found["bytes_a_token"] * found["tokens"]
    return moved / median(found["seconds"]) / results["roofs"]["memory_bytes"]


def _sampler(results: Results) -> list[str]:
    found, share = results.get("sampler", {}), sampler_share(results)
    if share is None:
        return ["sampler: not run"]
    taken, images, tokens = median(found["seconds"]), found["images"], found["tokens"]
    message = [
        f"sampler, guidance {results['about']['guidance']:g}, {images} at once: "
        f"{images * tokens / taken:,.1f} tokens/s, {images / taken:,.3g} images/s, "
        f"{share:.0%} of the memory roofline ({results['roofs']['memory_bytes'] / 1e9:,.1f} GB/s "
        f"measured); compiled in {_time([found['compile_seconds']])}"
    ]
    theirs = results.get("peer_seconds", {}).get("sample")
    if theirs is not None:
        message.append(
            f"  official PyTorch: {images * tokens / median(theirs):,.1f} tokens/s; "
            f"{_ratio(theirs, found['seconds'])} times its speed"
        )
    return message


def _input(results: Results) -> list[str]:
    if "input" not in results:
        return []
    speed, size = results["input"]["images_per_second"], results["about"]["batch_size"]
    message = f"input alone, stored codes: {speed:,.0f} images/s"
    steps = [x["step_seconds"] for x in results["variants"].values() if "step_seconds" in x]
    if steps:
        factor = speed * min(map(median, steps)) / size
        message += f", {factor:,.1f} times what the fastest step takes"
    return [message]


# The figure -----------------------------------------------------------------------------------------

_STEP, _PEER = "#444", "#c8553d"
_COLOURS = {
    "student": "#3b6ea5", "teacher": "#e0a33e", "projectors": "#7ea45b", "optimizer": "#9a86b8",
}  # fmt: skip


def figure(results: Results, path: pathlib.Path) -> None:
    """Draws the steps with their parts and the official code's, and the sampler below its roofline."""
    fig, (left, right) = pictures.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 1.3))
    _draw_steps(left, results)
    _draw_sampler(right, results)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    if left.get_legend_handles_labels()[0]:
        fig.legend(loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    about = results["about"]
    fig.suptitle(
        f"{about['scale']}, batch {about['batch_size']}, {about['generator']['dtype']}, "
        f"{about['devices']} x {about['device']}",
        fontsize=11,
    )
    pictures.save_figure(path, fig)


def _draw_steps(axes: Any, results: Results) -> None:
    ticks, place = {}, 0.0

    def bar(
        title: str, label: str, values: Sequence[float], color: str, begin: float = 0.0
    ) -> None:
        if label in axes.get_legend_handles_labels()[1]:
            label = f"_{label}"  # the legend has it
        drawn = axes.barh(place, median(values), left=begin, color=color, label=label)
        ticks[place] = title
        if title != "its parts":
            axes.bar_label(drawn, [_time(values)], padding=3, fontsize=9)

    for name, found in results["variants"].items():
        if "step_seconds" not in found:
            continue
        bar(name, "the whole step", found["step_seconds"], _STEP)
        parts, begin = found.get("part_seconds", {}), 0.0
        place += bool(parts)
        for part in (part for part in PARTS if part in parts):
            bar("its parts", f"{part} alone", parts[part], _COLOURS[part], begin)
            begin += median(parts[part])
        theirs = results.get("peer_seconds", {}).get(f"step {name}")
        if theirs is not None:
            place += 1
            bar("PyTorch", "official PyTorch", theirs, _PEER)
        place += 1.5
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step (median)")
    axes.margins(x=0.12)


def _draw_sampler(axes: Any, results: Results) -> None:
    share = sampler_share(results)
    if share is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "sampler: not run", ha="center")
        return
    found = results["sampler"]
    tokens = found["images"] * found["tokens"]
    speeds = {"here": tokens / median(found["seconds"])}
    theirs = results.get("peer_seconds", {}).get("sample")
    if theirs is not None:
        speeds["PyTorch"] = tokens / median(theirs)
    drawn = axes.bar(list(speeds), list(speeds.values()), color=(_STEP, _PEER), width=0.6)
    axes.bar_label(drawn, fmt=lambda x: f"{x:,.0f}" if x > 99 else f"{x:.1f}", fontsize=9)
    roofline = speeds["here"] / share
    axes.axhline(roofline, color="#3b6ea5", linestyle="--")
    axes.text(-0.4, roofline, "memory roofline", va="bottom", fontsize=9, color="#3b6ea5")
    axes.set_ylim(0, 1.15 * roofline)
    axes.set_ylabel("tokens/s")
    axes.set_title(f"sampling, {found['images']} at once", fontsize=10)
