"""What a benchmark found, as a table for the screen and as a figure. Missing numbers say "not run"."""

import pathlib
from collections.abc import Mapping
from typing import Any

from mirai_jax.benchmark.measure import median, ratio

PARTS = ("student", "teacher", "projectors", "optimizer")
_NOT_RUN = "not run"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _NOT_RUN
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _size(count: float | None) -> str:
    return _NOT_RUN if count is None else f"{count / 2**30:.2f} GiB"


def _times(factor: float | None) -> str:
    return _NOT_RUN if factor is None else f"{factor:.2f}"


def _middle(values: list[float] | None) -> float | None:
    return None if values is None else median(values)


def lines(results: Mapping[str, Any]) -> list[str]:
    """The table."""
    about = results["about"]
    config, size = about["generator"], about["batch_size"]
    cores = f", {about['cores']} cores" if about["platform"] == "cpu" and about["cores"] else ""
    message = [
        f"{about['scale']}: {config['num_layers']} layers of {config['width']}, "
        f"{config['grid'][0]}x{config['grid'][1]} tokens, {config['vocab_size']} codes; batch {size}, "
        f"{config['dtype']}, teachers {about['teacher_dtype']}, remat {config['remat']}",
        f"{about['devices']} x {about['device']}{cores}; jax {about['versions']['jax']}",
        "",
    ]
    message += _table(results) if results["variants"] else []
    message += _sampler(results)
    if "input" in results:
        speed = results["input"]["images_per_second"]
        message.append(
            f"input alone, stored codes: {speed:,.0f} images/s{_input_share(results, speed)}"
        )
    return message


def _table(results: Mapping[str, Any]) -> list[str]:
    variants, roofs = results["variants"], results.get("roofs", {})
    size, peers = results["about"]["batch_size"], results.get("peer_seconds", {})
    length = results["about"]["generator"]["grid"][0] * results["about"]["generator"]["grid"][1]
    rows: list[tuple[str, list[str]]] = []

    def row(title: str, cell: Any) -> None:
        rows.append((title, [cell(name, found) for name, found in variants.items()]))

    def rate(count: float, found: Mapping[str, Any]) -> str:
        taken = _middle(found.get("step_seconds"))
        return _NOT_RUN if taken is None else f"{count / taken:,.1f}"

    def against_baseline(name: str, found: Mapping[str, Any]) -> str:
        baseline = variants.get("llamagen", {}).get("step_seconds")
        if baseline is None or "step_seconds" not in found:
            return _NOT_RUN
        return _times(ratio(found["step_seconds"], baseline))

    def utilization(name: str, found: Mapping[str, Any]) -> str:
        taken = _middle(found.get("step_seconds"))
        if taken is None or "peak_flops" not in roofs:
            return _NOT_RUN
        return f"{_total(found) / taken / roofs['peak_flops']:.1%}"

    def xla(name: str, found: Mapping[str, Any]) -> str:
        share = found.get("xla_share")
        return _NOT_RUN if share is None else f"{share:.1%}"

    def of_plan(name: str, found: Mapping[str, Any]) -> str:
        peak = found.get("peak_bytes")
        return _NOT_RUN if peak is None else f"{_size(peak)} ({peak / found['plan']['total']:.0%})"

    def peer(name: str, found: Mapping[str, Any]) -> str:
        return _time(_middle(peers.get(f"step {name}")))

    def faster(name: str, found: Mapping[str, Any]) -> str:
        theirs = peers.get(f"step {name}")
        if theirs is None or "step_seconds" not in found:
            return _NOT_RUN
        return _times(ratio(theirs, found["step_seconds"]))

    row("train step", lambda name, found: _time(_middle(found.get("step_seconds"))))
    if len(variants) > 1:
        row("  over llamagen's", against_baseline)
    if any("part_seconds" in found for found in variants.values()):
        for part in PARTS:
            row(f"  {part} alone", lambda name, found, part=part: _part(found, part))
    row("images/s", lambda name, found: rate(size, found))
    row("tokens/s", lambda name, found: rate(size * length, found))
    row("TFLOP a step, formula", lambda name, found: f"{_total(found) / 1e12:.3f}")
    row("  XLA counts, of it", xla)
    if "peak_flops" in roofs:
        row(f"MFU of {roofs['peak_flops'] / 1e12:,.3g} TFLOP/s", utilization)
    row("compile", lambda name, found: _time(found["compile_seconds"]))
    row("memory, planned", lambda name, found: _size(found["plan"]["total"]))
    row("memory, at most in use", of_plan)
    if peers or results.get("peer_refused"):
        row("official PyTorch, step", peer)
        row("  times its speed", faster)
    wide = max(len(title) for title, _ in rows)
    message = [" " * wide + "".join(f"{name:>18}" for name in variants)]
    message += [
        f"{title:<{wide}}" + "".join(f"{cell:>18}" for cell in cells) for title, cells in rows
    ]
    if "peak_flops" in roofs:
        message.append(f"({roofs['peak_flops'] / 1e12:,.3g} TFLOP/s {roofs['peak_by']})")
    message += [
        f"official PyTorch, {name}: {why}" for name, why in results.get("peer_refused", {}).items()
    ]
    return [*message, ""]


def _total(found: Mapping[str, Any]) -> int:
    return sum(found["flops"].values())


def _part(found: Mapping[str, Any], part: str) -> str:
    parts = found.get("part_seconds")
    if parts is not None and part not in parts:
        return "-"  # there is none
    return _time(_middle((parts or {}).get(part)))


def sampler_share(results: Mapping[str, Any]) -> float | None:
    """The sampler's share of the memory roof: bytes it must read over what could be read."""
    found = results.get("sampler", {})
    if "seconds" not in found or "roofs" not in results:
        return None
    moved = found["bytes_a_token"] * found["tokens"]
    return moved / median(found["seconds"]) / results["roofs"]["memory_bytes"]


def _sampler(results: Mapping[str, Any]) -> list[str]:
    found = results.get("sampler")
    if found is None or "seconds" not in found:
        return ["sampler: not run"]
    taken, images = median(found["seconds"]), found["images"]
    message = (
        f"sampler, guidance {results['about']['guidance']:g}, {images} at once: "
        f"{images * found['tokens'] / taken:,.1f} tokens/s, {images / taken:,.3g} images/s"
    )
    share = sampler_share(results)
    if share is not None:
        memory = results["roofs"]["memory_bytes"] / 1e9
        message += f", {share:.0%} of the memory roof ({memory:,.1f} GB/s measured)"
    message += f"; compiled in {_time(found['compile_seconds'])}"
    theirs = results.get("peer_seconds", {}).get("sample")
    if theirs is None:
        return [message]
    speed = images * found["tokens"] / median(theirs)
    more = f"{ratio(theirs, found['seconds']):.2f} times its speed"
    return [message, f"  official PyTorch: {speed:,.1f} tokens/s; {more}"]


def _input_share(results: Mapping[str, Any], speed: float) -> str:
    taken = [
        found["step_seconds"] for found in results["variants"].values() if "step_seconds" in found
    ]
    if not taken:
        return ""
    needed = max(results["about"]["batch_size"] / median(values) for values in taken)
    return f", {speed / needed:,.1f} times what the fastest step takes"


def figure(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Steps beside each other with their parts, the peer's beside them, and the sampler below its roof."""
    import matplotlib
    import matplotlib.patches

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = {k: v for k, v in results["variants"].items() if "step_seconds" in v}
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=(3, 1.3), layout="constrained"
    )
    _draw_steps(left, variants, results)
    _draw_sampler(right, results)
    if variants:
        colours = {"the whole step": "#444"}
        colours |= {f"{part} alone": colour for part, colour in _COLOURS.items()}
        if any(f"step {name}" in results.get("peer_seconds", {}) for name in variants):
            colours["official PyTorch"] = _PEER
        patches = [matplotlib.patches.Patch(color=c, label=text) for text, c in colours.items()]
        fig.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    about = results["about"]
    fig.suptitle(
        f"{about['scale']}, batch {about['batch_size']}, {about['generator']['dtype']}, "
        f"{about['devices']} x {about['device']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


_PEER = "#c8553d"
_COLOURS = {
    "student": "#3b6ea5", "teacher": "#e0a33e", "projectors": "#7ea45b", "optimizer": "#9a86b8",
}  # fmt: skip


def _draw_steps(axes: Any, variants: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    peers, titles = results.get("peer_seconds", {}), []
    place = 0.0
    for name, found in variants.items():
        whole = median(found["step_seconds"])
        axes.barh(place, whole, color="#444")
        axes.text(whole, place, f" {_time(whole)}", va="center", fontsize=9)
        titles.append((place, name))
        place += 1
        begin = 0.0
        for part in PARTS:
            taken = _middle(found.get("part_seconds", {}).get(part))
            if taken is not None:
                axes.barh(place, taken, left=begin, color=_COLOURS[part])
                begin += taken
        if begin:
            titles.append((place, "its parts"))
            place += 1
        theirs = _middle(peers.get(f"step {name}"))
        if theirs is not None:
            axes.barh(place, theirs, color=_PEER)
            axes.text(theirs, place, f" {_time(theirs)}", va="center", fontsize=9)
            titles.append((place, "PyTorch"))
            place += 1
        place += 0.5
    axes.set_yticks([y for y, _ in titles], [title for _, title in titles])
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step (median)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sampler(axes: Any, results: Mapping[str, Any]) -> None:
    share = sampler_share(results)
    if share is None:
        axes.axis("off")
        axes.text(0.5, 0.5, "sampler: not run", ha="center")
        return
    found = results["sampler"]
    speed = found["images"] * found["tokens"] / median(found["seconds"])
    bars = {"here": (speed, "#444")}
    theirs = results.get("peer_seconds", {}).get("sample")
    if theirs is not None:
        bars["PyTorch"] = (found["images"] * found["tokens"] / median(theirs), _PEER)
    for name, (height, colour) in bars.items():
        axes.bar(name, height, color=colour, width=0.6)
        axes.text(
            name,
            height,
            f"{height:,.0f}\n" if height > 99 else f"{height:.1f}\n",
            ha="center",
            va="center",
            fontsize=9,
        )
    axes.axhline(speed / share, color="#3b6ea5", linestyle="--")
    axes.text(
        0.02,
        speed / share,
        " memory roof",
        va="bottom",
        transform=axes.get_yaxis_transform(),
        fontsize=9,
        color="#3b6ea5",
    )
    axes.set_ylim(0, 1.15 * speed / share)
    axes.set_ylabel("tokens/s")
    axes.set_title(f"sampling, {found['images']} at once", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
