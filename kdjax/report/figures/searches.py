"""Figures of sweeps over one setting, and of the trials of a hyperparameter search."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.report import text
from kdjax.report.comparisons import Result
from kdjax.report.figures import style
from kdjax.report.figures.style import Axes, Panel, Table


def swept_panels(result: Result) -> list[Panel]:
    """Per sweep its first three metrics against the swept value."""
    return [
        swept_panel(result, sweep, metric=metric)
        for sweep in result.get("swept", [])
        for metric in list(dict.fromkeys(m for metrics in sweep["arms"].values() for m in metrics))[:3]
    ]


def swept_panel(result: Result, sweep: Mapping[str, Any], *, metric: str) -> Panel:
    """A metric against a swept value: one line per arm, with 95 % intervals over the seeds."""
    kind, colours, markers = text.metric_of(metric), style.colours_of(result), style.markers_of(result)
    values = np.asarray(sweep["values"], np.float64)
    arms = {
        arm: [kind.scale * np.asarray(runs, np.float64) for runs in metrics[metric]]
        for arm, metrics in sweep["arms"].items()
        if metric in metrics
    }
    means = {arm: [float(runs.mean()) for runs in found] for arm, found in arms.items()}
    log = style.is_wide(sweep["values"])

    def draw(ax: Axes) -> None:
        style.value_ticks(ax, values, log=log)
        for i, (arm, found) in enumerate(arms.items()):
            x = style.shifted(values, 0.014 * (i - (len(arms) - 1) / 2), log=log)
            ax.plot(x, means[arm], color=colours[arm], lw=1.5, marker=markers[arm], markersize=4.5)
            for at, runs in zip(x, found, strict=True):
                if len(runs) > 1:
                    ax.plot((at, at), style.interval(runs), color=colours[arm], lw=1.5, alpha=0.55)
        style.label_ends(ax, {arm: mean[-1] for arm, mean in means.items()}, colours)
        style.value_axis(ax, sweep["name"], text.axis_title(kind))

    several = any(len(runs) > 1 for found in arms.values() for runs in found)
    caption = f"{text.capital(kind.title)} against {sweep['name']}" + " on a logarithmic axis" * log + ". "
    caption += "Mark: mean over seeds; vertical line: its 95 % interval." if several else "One seed."
    ends = []
    for arm, mean in means.items():
        best = int(np.argmax(mean) if kind.higher is not False else np.argmin(mean))
        ends.append(f"{arm} {text.with_unit(mean[best], kind)} at {values[best]:g}")
    which = "lowest" if kind.higher is False else "highest"
    alt = f"Lines of {kind.title} against {sweep['name']}, {which}: {text.listing(ends)}."
    title = f"Numbers: {text.axis_title(kind)}" + ", mean ± standard deviation" * several
    rows = [
        [f"{value:g}", *(text.mean_sd(found[i] / kind.scale, kind) for found in arms.values())]
        for i, value in enumerate(values)
    ]
    return Panel(draw, caption, alt, 2.7, Table(title, [sweep["name"], *arms], rows))


def trial_panels(result: Result) -> list[Panel]:
    """The trials of a search against each setting that it varied; the first figure has the table of all trials."""
    trials = result.get("trials", [])
    flags = list(dict.fromkeys(flag for trial in trials for flag in trial["settings"]))
    varied = [flag for flag in flags if len({str(t["settings"].get(flag)) for t in trials}) > 1]
    if not any(trial["value"] is not None for trial in trials):
        return []
    found = [trial_panel(result, flag=flag) for flag in (varied or flags)[:6]]
    return [found[0]._replace(table=_trial_table(result, flags)), *found[1:]] if found else []


def trial_panel(result: Result, *, flag: str) -> Panel:
    """The value of every trial against one setting: finished ones filled, stopped ones hollow, the best labelled."""
    metric, best = text.metric_of(result["trials_metric"]), _best_trial(result)
    trials = [t for t in result["trials"] if t["value"] is not None and flag in t["settings"]]
    settings = [trial["settings"][flag] for trial in trials]
    numeric = all(isinstance(s, int | float) and not isinstance(s, bool) for s in settings)
    names = list(dict.fromkeys(_setting(s) for s in settings))
    positions = settings if numeric else [names.index(_setting(s)) for s in settings]
    log = bool(numeric and settings and style.is_wide(settings))

    def draw(ax: Axes) -> None:
        for trial, x in zip(trials, positions, strict=True):
            colour = style.ORANGE if trial is best else style.BLUE
            face = colour if trial["outcome"] == "finished" else "none"
            size, order = (9, 4) if trial is best else (6, 3)
            y = metric.scale * trial["value"]
            look = {"markersize": size, "markerfacecolor": face, "markeredgecolor": colour, "zorder": order}
            ax.plot(x, y, "o", markeredgewidth=1.2, alpha=0.9, **look)
            if trial is best:
                style.beside(ax, y, f"trial {trial['number']}", colour)
        if numeric:
            style.value_ticks(ax, np.unique(np.asarray(settings, np.float64)), log=log)
        else:
            ax.set_xticks(range(len(names)), [style.short(name, 14) for name in names])
            ax.set_xlim(-0.5, len(names) - 0.5)
            if len(names) > 4:
                ax.tick_params(axis="x", rotation=90)
        style.value_axis(ax, flag, text.axis_title(metric))

    left = len(result["trials"]) - len(trials)
    caption = f"{text.capital(metric.title)} of every trial, against {flag}"
    caption += " on a logarithmic axis." if log else "."
    if any(trial["outcome"] != "finished" for trial in trials):
        caption += " Hollow: stopped early."
    alt = f"Scatter plot of {metric.title} against {flag}, {len(trials)} trials"
    if best is not None:
        setting = _setting(best["settings"].get(flag))
        at = f"{text.with_unit(metric.scale * best['value'], metric)}, {flag} {setting}"
        caption += f" The best, in orange, is trial {best['number']}: {at}."
        alt += f", the best is trial {best['number']} with {at}"
    if left:
        caption += f" {left} trial{'s' * (left > 1)} without a value {'are' if left > 1 else 'is'} not drawn."
    return Panel(draw, caption, alt + ".", 2.7)


def _trial_table(result: Result, flags: Sequence[str]) -> Table:
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
    return Table(f"All {len(rows)} trials, the best first", head, rows)


def _best_trial(result: Result) -> Mapping[str, Any] | None:
    finished = [trial for trial in result["trials"] if trial["outcome"] == "finished"]
    choose = min if text.metric_of(result["trials_metric"]).higher is False else max
    return choose(finished, key=lambda trial: trial["value"]) if finished else None


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
