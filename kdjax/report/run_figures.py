"""Figures of runs: every seed of every arm, training curves, ratios to peers, what a sweep and a search have found."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdjax import significance
from kdjax.report import text
from kdjax.report.style import (
    LIGHT,
    Folded,
    Panel,
    beside,
    colours_of,
    in_two_lines,
    interval,
    is_wide,
    markers_of,
    short,
    spread,
)
from kdjax.report.text import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def dot_panel(result: Result, *, metric: str) -> Panel:
    """Every seed of every arm as a dot, with the mean and its 95 % t-interval."""
    from matplotlib.ticker import LogLocator

    arms = [arm for arm, metrics in result["arms"].items() if metric in metrics]
    kind, colours = text.metric_of(metric), colours_of(result)
    values = [kind.scale * np.asarray(result["arms"][arm][metric], np.float64) for arm in arms]
    flat = np.concatenate(values)

    def draw(ax: "Axes") -> None:
        for y, (arm, runs) in enumerate(zip(arms, values, strict=True)):
            colour, mean = LIGHT[colours[arm]], float(runs.mean())
            if len(runs) > 1:
                below = y + 0.27 + np.linspace(-0.08, 0.08, len(runs))
                ax.scatter(runs, below, s=22, color=colour, alpha=0.5, linewidths=0)
                ax.plot(interval(runs), (y, y), color=colour, lw=2)
            ax.plot(mean, y, "o", color=colour, markersize=6)
            beside(ax, y, text.mean_text(result, arm, metric), colour)
        if kind.unit != "%" and flat.min() > 0 and flat.max() > 10 * flat.min():
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if flat.max() < 50 * flat.min() else (1,)))
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(arms)), [in_two_lines(arm) for arm in arms])
        ax.set_ylim(len(arms) - 0.45, -0.45)
        ax.set_title(text.axis_title(kind))
        ax.grid(axis="x")

    unit = "repeat" if result.get("ratios") else "seed"
    caption = f"Each dot is the only {unit} that was run."
    if any(len(runs) > 1 for runs in values):
        caption = f"Small dots: one {unit} each. Large dot and line: mean and its 95 % interval."
    means = text.listing([f"{arm} {text.mean_text(result, arm, metric)}" for arm in arms])
    return Panel(draw, caption, f"Dot plot of {kind.title} by arm, means: {means}.", 0.7 + 0.46 * len(arms))


def curve_panel(result: Result, *, metric: str) -> Panel:
    """A metric over the epochs: mean over seeds as a line, lowest to highest seed as a band."""
    from matplotlib.ticker import MaxNLocator

    kind, colours = text.metric_of(metric), colours_of(result)
    curves = {arm: _stack(c[metric]) for arm, c in result["curves"].items() if metric in c}
    curves = {arm: (epochs, kind.scale * runs) for arm, (epochs, runs) in curves.items() if epochs.size}

    def draw(ax: "Axes") -> None:
        for arm, (epochs, runs) in curves.items():
            colour = LIGHT[colours[arm]]
            if len(runs) > 1:
                ax.fill_between(epochs, runs.min(0), runs.max(0), color=colour, alpha=0.18, linewidth=0)
            marker = "o" if epochs.size == 1 else None
            ax.plot(epochs, runs.mean(0), color=colour, lw=1.8, marker=marker, markersize=4)
        if curves:
            _limit(ax, curves)
            heights = spread(ax, [float(runs[:, -1].mean()) for _, runs in curves.values()])
            for arm, y in zip(curves, heights, strict=True):
                beside(ax, y, short(arm, 16), LIGHT[colours[arm]], rows="axes fraction")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"])
        ax.set_xlabel("epoch")
        ax.set_title(text.axis_title(kind))
        ax.grid(axis="y")

    several = any(len(runs) > 1 for _, runs in curves.values())
    caption = f"{text.capital(kind.title)} over training. " + (
        "Line: mean over seeds; band: lowest to highest seed." if several else "One seed."
    )
    last = {arm: text.number(float(runs[:, -1].mean()), kind.decimals) for arm, (_, runs) in curves.items()}
    ends = text.listing([f"{arm} {text} {kind.unit}".rstrip() for arm, text in last.items()] or ["no values"])
    alt = f"Curves of {kind.title} by epoch, at the end: {ends}."
    return Panel(draw, caption, alt, 2.7)


def ratio_panel(result: Result) -> Panel:
    """How many times kdjax is ahead of each peer, on a logarithmic axis with a line at one."""
    ratios = result["ratios"]
    low = min(1.0, *(r["low"] for r in ratios.values()))
    high = max(1.0, *(r["high"] for r in ratios.values()))

    def draw(ax: "Axes") -> None:
        ax.set_xscale("log")
        for y, r in enumerate(ratios.values()):
            colour = LIGHT["s2" if r["low"] > 1 else "s0" if r["high"] < 1 else "muted"]
            ax.plot((1, r["median"]), (y, y), color=colour, lw=1, alpha=0.5)
            ax.plot((r["low"], r["high"]), (y, y), color=colour, lw=4, alpha=0.45, solid_capstyle="butt")
            ax.plot(r["median"], y, "o", color=colour, markersize=7)
            beside(ax, y, text.times(r["median"]), colour)
        ax.axvline(1, color=LIGHT["ink"], lw=1)
        margin = (high / low) ** 0.07
        ax.set_xlim(low / margin, high * margin)
        ticks = _ratio_ticks(low, high)
        ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(range(len(ratios)), [in_two_lines(peer) for peer in ratios])
        ax.set_ylim(len(ratios) - 0.5, -0.5)
        ax.set_title("times faster or smaller")
        ax.grid(axis="x")

    caption = (
        "Against each peer: the median, and from low to high, on a logarithmic axis. Right of the line at 1× kdjax is "
        "ahead."
    )
    medians = text.listing([f"{peer} {text.times(r['median'])}" for peer, r in ratios.items()])
    return Panel(draw, caption, f"Ratios of kdjax to its peers: {medians}.", 0.85 + 0.4 * len(ratios))


def swept_panels(result: Result) -> list[Panel]:
    """Per sweep its first metrics against the swept value, one line per arm with 95 % intervals over the seeds."""
    return [
        swept_panel(result, sweep, metric=metric)
        for sweep in result.get("swept", [])
        for metric in list(dict.fromkeys(m for metrics in sweep["arms"].values() for m in metrics))[:3]
    ]


def swept_panel(result: Result, sweep: Mapping[str, Any], *, metric: str) -> Panel:
    """A metric against a swept value; the axis of values is logarithmic where they span much."""
    kind, colours, markers = text.metric_of(metric), colours_of(result), markers_of(result)
    values = np.asarray(sweep["values"], np.float64)
    arms = {
        arm: [kind.scale * np.asarray(runs, np.float64) for runs in metrics[metric]]
        for arm, metrics in sweep["arms"].items()
        if metric in metrics
    }
    means = {arm: [float(runs.mean()) for runs in found] for arm, found in arms.items()}
    wide = is_wide(sweep["values"])

    def draw(ax: "Axes") -> None:
        if wide:
            ax.set_xscale("log")
        _value_ticks(ax, values, wide=wide)
        for i, (arm, found) in enumerate(arms.items()):
            # Beside each other, so that no interval hides another.
            x = _shifted(values, 0.014 * (i - (len(arms) - 1) / 2), wide=wide)
            colour = LIGHT[colours[arm]]
            ax.plot(x, means[arm], color=colour, lw=1.5, marker=markers[arm], markersize=4.5)
            for at, runs in zip(x, found, strict=True):
                if len(runs) > 1:
                    ax.plot((at, at), interval(runs), color=colour, lw=1.5, alpha=0.55)
        heights = spread(ax, [mean[-1] for mean in means.values()])
        for arm, y in zip(arms, heights, strict=True):
            beside(ax, y, short(arm, 16), LIGHT[colours[arm]], rows="axes fraction")
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"])
        ax.set_xlabel(sweep["name"])
        ax.set_title(text.axis_title(kind))
        ax.grid(axis="y")

    several = any(len(runs) > 1 for found in arms.values() for runs in found)
    caption = f"{text.capital(kind.title)} against {sweep['name']}" + " on a logarithmic axis" * wide + ". "
    caption += "Mark: mean over seeds; upright line: its 95 % interval." if several else "One seed."
    ends = []
    for arm, mean in means.items():
        best = int(np.argmax(mean) if kind.higher is not False else np.argmin(mean))
        ends.append(f"{arm} {_printed(kind, mean[best])} at {values[best]:g}")
    which = "lowest" if kind.higher is False else "highest"
    alt = f"Lines of {kind.title} against {sweep['name']}, {which}: {text.listing(ends)}."
    rows = [
        [f"{value:g}", *(_mean_sd(metric, found[i] / kind.scale) for found in arms.values())]
        for i, value in enumerate(values)
    ]
    head = [sweep["name"], *arms]
    title = f"Numbers: {text.axis_title(kind)}, mean ± standard deviation" if several else "Numbers"
    return Panel(draw, caption, alt, 2.7, Folded(title, [(head, rows)]))


def trial_panels(result: Result) -> list[Panel]:
    """What a search has found, against each setting that it varied; all trials are listed under the first figure."""
    trials = result.get("trials", [])
    flags = list(dict.fromkeys(flag for trial in trials for flag in trial["settings"]))
    varied = [flag for flag in flags if len({str(t["settings"].get(flag)) for t in trials}) > 1]
    if not any(trial["value"] is not None for trial in trials):
        return []
    found = [trial_panel(result, flag=flag) for flag in (varied or flags)[:6]]
    return [found[0]._replace(folded=_trial_table(result, flags)), *found[1:]] if found else []


def trial_panel(result: Result, *, flag: str) -> Panel:
    """The value of every trial against one setting: finished ones filled, stopped ones hollow, the best named."""
    metric, best = text.metric_of(result["trials_metric"]), _best_trial(result)
    trials = [t for t in result["trials"] if t["value"] is not None and flag in t["settings"]]
    settings = [trial["settings"][flag] for trial in trials]
    numeric = all(isinstance(s, int | float) and not isinstance(s, bool) for s in settings)
    names = list(dict.fromkeys(_setting(s) for s in settings))
    positions = settings if numeric else [names.index(_setting(s)) for s in settings]
    wide = bool(numeric and settings and is_wide(settings))

    def draw(ax: "Axes") -> None:
        if wide:
            ax.set_xscale("log")
        for trial, x in zip(trials, positions, strict=True):
            colour = LIGHT["s0" if trial is best else "s1"]
            face = colour if trial["outcome"] == "finished" else "none"
            size, order = (9, 4) if trial is best else (6, 3)
            y = metric.scale * trial["value"]
            look = {"markersize": size, "markerfacecolor": face, "markeredgecolor": colour, "zorder": order}
            ax.plot(x, y, "o", markeredgewidth=1.2, alpha=0.9, **look)
            if trial is best:
                beside(ax, y, f"trial {trial['number']}", colour)
        if numeric:
            _value_ticks(ax, np.unique(np.asarray(settings, np.float64)), wide=wide)
        else:
            ax.set_xticks(range(len(names)), [short(name, 14) for name in names])
            ax.set_xlim(-0.5, len(names) - 0.5)
            if len(names) > 4:
                ax.tick_params(axis="x", rotation=90)
        ax.tick_params(axis="y", labelcolor=LIGHT["muted"])
        ax.set_xlabel(flag)
        ax.set_title(text.axis_title(metric))
        ax.grid(axis="y")

    left = len(result["trials"]) - len(trials)
    caption = f"{text.capital(metric.title)} of every setting tried, against {flag}"
    caption += " on a logarithmic axis." if wide else "."
    if any(trial["outcome"] != "finished" for trial in trials):
        caption += " Hollow: stopped before its end."
    alt = f"Scatter plot of {metric.title} against {flag}, {len(trials)} trials"
    if best is not None:
        at = (
            f"{_printed(metric, metric.scale * best['value'])}, {flag} {_setting(best['settings'].get(flag))}"
        )
        caption += f" The best, in orange, is trial {best['number']}: {at}."
        alt += f", the best is trial {best['number']} with {at}"
    if left:
        caption += f" {left} trial{'s' * (left > 1)} without a value {'are' if left > 1 else 'is'} not drawn."
    return Panel(draw, caption, alt + ".", 2.7)


def _trial_table(result: Result, flags: Sequence[str]) -> Folded:
    metric = text.metric_of(result["trials_metric"])
    sign = -1 if metric.higher is not False else 1
    ordered = sorted(
        result["trials"], key=lambda t: (t["value"] is None, sign * (t["value"] or 0), t["number"])
    )
    head = ["trial", text.axis_title(metric), "outcome", *flags, "seconds"]
    rows = [
        [
            str(t["number"]),
            "–" if t["value"] is None else text.number(metric.scale * t["value"], metric.decimals),
            "stopped early" if t["outcome"] == "pruned" else t["outcome"],
            *(_setting(t["settings"][flag]) if flag in t["settings"] else "–" for flag in flags),
            text.number(t["seconds"], 1 if t["seconds"] < 100 else 0),
        ]
        for t in ordered
    ]
    return Folded(f"All {len(rows)} trials, the best first", [(head, rows)])


def _best_trial(result: Result) -> Mapping[str, Any] | None:
    finished = [trial for trial in result["trials"] if trial["outcome"] == "finished"]
    choose = min if text.metric_of(result["trials_metric"]).higher is False else max
    return choose(finished, key=lambda trial: trial["value"]) if finished else None


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _printed(metric: text.Metric, value: float) -> str:
    return f"{text.number(value, metric.decimals)} {metric.unit}".rstrip()


def _mean_sd(name: str, runs: np.ndarray) -> str:
    metric = text.metric_of(name)
    mean, sd, n = significance.summarise((metric.scale * runs).tolist())
    decimals = text.places(mean) if metric.decimals is None else metric.decimals
    return text.number(mean, decimals) + (f" ± {text.number(sd, decimals)}" if n > 1 else "")


def _value_ticks(ax: "Axes", values: np.ndarray, *, wide: bool) -> None:
    """Marks the values themselves where they are few and lie apart, else round numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    scale = np.log10(values) if wide else values
    range_ = float(np.ptp(scale)) or 1.0
    if len(values) <= 8 and (len(values) == 1 or float(np.diff(scale).min()) > 0.095 * range_):
        ax.set_xticks(values.tolist(), [f"{value:g}" for value in values])
    else:
        ax.xaxis.set_major_locator(LogLocator(numticks=7) if wide else MaxNLocator(nbins=6))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    low, high = float(scale.min()) - 0.06 * range_, float(scale.max()) + 0.06 * range_
    ax.set_xlim((10**low, 10**high) if wide else (low, high))


def _shifted(values: np.ndarray, part: float, *, wide: bool) -> np.ndarray:
    """Values moved by a part of their range along the axis."""
    scale = np.log10(values) if wide else values
    moved = scale + part * (float(np.ptp(scale)) or 1.0)
    return 10**moved if wide else moved


def _stack(runs: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Epoch numbers and runs [seed, epoch], at the epochs where every seed has a value."""
    length = min(map(len, runs))
    values = np.asarray([list(run)[:length] for run in runs], np.float64)
    kept = np.isfinite(values).all(0)
    return 1 + np.flatnonzero(kept), values[:, kept]


def _limit(ax: "Axes", curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Leaves the first fifth of a long training out of the vertical range, where curves fall or rise from afar."""
    late = [r[:, r.shape[1] // 5 if r.shape[1] >= 10 else 0 :] for _, r in curves.values()]
    low, high = min(float(r.min()) for r in late), max(float(r.max()) for r in late)
    margin = 0.06 * (high - low) or 0.01
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlim(1, max(2, *(int(epochs[-1]) for epochs, _ in curves.values())))


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, finer where the range is short; 1 is always among them."""
    fine, medium, coarse = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 8, 9), (1, 2, 5), (1,)
    steps = coarse if high / low > 300 else medium if high / low > 4 else fine
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = {step * 10.0**power for power in powers for step in steps}
    kept = [1.0]
    for tick in sorted((t for t in ticks if low * 0.97 <= t <= high * 1.03), key=lambda t: abs(math.log(t))):
        if all(abs(math.log(tick / other)) > 0.24 * math.log(high / low) for other in kept):
            kept.append(tick)
    return sorted(kept)
