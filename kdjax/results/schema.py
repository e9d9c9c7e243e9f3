"""The checks of a result file, before it is written and after it is read.

An error names the field by its path, such as ``robustness/kd/fgsm/8``, what it needs, and what it holds.
"""

import itertools
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCHEMA = 2
REQUIRED = {
    "schema": int,
    "name": str,
    "question": str,
    "command": str,
    "flags": dict,
    "created": str,
    "commit": str,
    "dirty": bool,
    "versions": dict,
    "hardware": dict,
    "wall_clock_s": (int, float),
    "scaled_down": str,
    "seeds": list,
    "arms": dict,
}
_INFINITE = 1e100  # larger than any measurement, and its square is still a float
OUTCOMES = ("finished", "pruned", "failed")


def upgrade(content: Any) -> dict[str, Any]:
    """Turns a result of schema 1, which had fewer optional fields, into one of schema 2.

    Raises:
      ValueError: if the content is not a result, or of a newer schema.
    """
    if not isinstance(content, Mapping) or "schema" not in content:
        raise ValueError(
            "this JSON is not a result of kdjax; leave the file out, or run the experiment again."
        )
    version = content["schema"]
    if not _is_count(version) or version < 1:
        raise ValueError(f"schema needs a version from 1 to {SCHEMA}, got {reprlib.repr(version)}.")
    if version > SCHEMA:
        raise ValueError(
            f"this kdjax reads schema 1 to {SCHEMA}, the result has the newer {version}; update kdjax."
        )
    return {**content, "schema": SCHEMA}


def check(content: Any) -> None:
    """Checks a result against the schema in the docstring of :mod:`kdjax.results`.

    Raises:
      ValueError: naming the first field that is missing, or of a wrong type or length, or not finite.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"a result is a JSON object, got {type(content).__name__}.")
    _check_required(content)
    seeds = _checked_seeds(content)
    arms = content["arms"]
    for arm, metrics in _items(arms, "arms"):
        for metric, values in _items(metrics, f"arms/{arm}"):
            _check_per_seed(values, f"{arm}/{metric}", seeds[arm])
    for field, checked in {
        "curves": _check_curves,
        "robustness": _check_robustness,
        "calibration": _check_calibration,
        "confusion": _check_confusion,
        "costs": _check_costs,
        "flatness": _check_flatness,
        "densities": _check_density,
        "surfaces": _check_surface,
    }.items():
        for arm, value in _items(content.get(field, {}), field):
            _need(arm in arms, f"{field}/{arm}", f"an arm of the result ({_listed(arms)})", arm)
            checked(value, f"{field}/{arm}", seeds[arm])
    for field, checked in {
        "comparisons": _check_comparison,
        "notes": _check_text,
        "swept": _check_swept,
        "trials": _check_trial,
        "overlays": _check_overlay,
    }.items():
        for i, value in enumerate(_list(content.get(field, []), field)):
            checked(value, f"{field}/{i}")
    for peer, ratio in _items(content.get("ratios", {}), "ratios"):
        _check_ratio(ratio, f"ratios/{peer}")
    _check_together(content)
    _check_finite(content)


def _check_required(content: Mapping[str, Any]) -> None:
    for field, kind in REQUIRED.items():
        value = content.get(field)
        # In Python True is an int.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"a result needs the field {field!r}, got {reprlib.repr(value)}.")
    if content["schema"] != SCHEMA:
        raise ValueError(
            f"a result written by this kdjax has schema {SCHEMA}, got {reprlib.repr(content['schema'])}."
        )
    _need(_is_number(content["wall_clock_s"]), "wall_clock_s", "a finite number", content["wall_clock_s"])


def _checked_seeds(content: Mapping[str, Any]) -> dict[str, int]:
    """The number of seeds of each arm."""
    seeds, own = content["seeds"], content.get("arm_seeds", {})
    arms = content["arms"]
    for path, found in [("seeds", seeds), *((f"arm_seeds/{a}", s) for a, s in _items(own, "arm_seeds"))]:
        _need(all(map(_is_whole, _list(found, path))), path, "whole numbers", found)
        _need(found or not arms, path, "at least one seed", found)
    for arm in own:
        _need(arm in arms, f"arm_seeds/{arm}", f"an arm of the result ({_listed(arms)})", arm)
    return {arm: len(own.get(arm, seeds)) for arm in arms}


def _check_per_seed(values: Any, path: str, seeds: int) -> None:
    values = _list(values, path)
    if len(values) != seeds:
        raise ValueError(f"{path} has {len(values)} values for {seeds} seeds.")
    if not _are_numbers(values):
        raise ValueError(f"{path} holds a value that is no finite number: {reprlib.repr(values)}.")


def _check_curves(metrics: Any, path: str, seeds: int) -> None:
    for metric, runs in _items(metrics, path):
        runs = _list(runs, f"{path}/{metric}")
        needed = f"one non-empty list of finite numbers or null for each of the {seeds} seeds"
        _need(len(runs) == seeds, f"{path}/{metric}", needed, runs)
        for run in runs:
            fine = isinstance(run, Sequence) and run and _are_numbers([v for v in run if v is not None])
            _need(fine, f"{path}/{metric}", needed, run)


def _check_robustness(perturbations: Any, path: str, seeds: int) -> None:
    for name, values in _items(perturbations, path):
        kind, *rest = name.split("/")
        named = bool(kind) and len(rest) <= 2 and all(map(_is_size, rest[:1]))
        _need(named, f"{path}/{name}", "a name of the form kind, kind/size or kind/size/metric", name)
        _check_per_seed(values, f"{path}/{name}", seeds)
        fractions = len(rest) == 2 or all(0 <= v <= 1 for v in values)
        _need(fractions, f"{path}/{name}", "accuracies between 0 and 1", values)


def _check_calibration(bins: Any, path: str, seeds: int) -> None:
    del seeds  # pooled
    columns = [
        _numbers(_get(bins, name, path), f"{path}/{name}") for name in ("confidence", "accuracy", "count")
    ]
    confidence, accuracy, count = columns
    _need(len({len(column) for column in columns}) == 1, path, "as many bins in each list", bins)
    _need(all(0 <= v <= 1 for v in [*confidence, *accuracy]), path, "fractions between 0 and 1", bins)
    _need(min(count) >= 0 and sum(count) > 0, f"{path}/count", "counts of at least one example", count)


def _check_confusion(matrix: Any, path: str, seeds: int) -> None:
    del seeds
    rows = _list(matrix, path)
    square = bool(rows) and all(isinstance(row, list) and len(row) == len(rows) for row in rows)
    _need(square, path, "a square matrix, true class by predicted class", matrix)
    counts = [v for row in rows for v in row]
    fine = _are_numbers(counts) and min(counts) >= 0 and any(counts)
    _need(fine, path, "counts of at least one example", matrix)


def _check_costs(cost: Any, path: str, seeds: int) -> None:
    del seeds
    parameters = _get(cost, "parameters", path)
    latencies = _numbers(_get(cost, "latency_ms", path), f"{path}/latency_ms")
    _need(
        _is_count(parameters) and parameters > 0, f"{path}/parameters", "a whole number above 0", parameters
    )
    _need(min(latencies) > 0, f"{path}/latency_ms", "milliseconds above 0", latencies)


def _check_flatness(measures: Any, path: str, seeds: int) -> None:
    _get(measures, "loss", path)
    for name, values in _items(measures, path):
        form = re.fullmatch(r"\w+(/filter_normalised)?", name)
        _need(form, f"{path}/{name}", "a name of the form measure or measure/filter_normalised", name)
        _check_per_seed(values, f"{path}/{name}", seeds)


def _check_density(density: Any, path: str, seeds: int) -> None:
    del seeds
    grid = _numbers(_get(density, "grid", path), f"{path}/grid")
    _need(len(grid) > 1 and _rises(grid), f"{path}/grid", "at least two rising numbers", grid)
    runs = _list(_get(density, "density", path), f"{path}/density")
    _need(runs, f"{path}/density", "at least one list of densities", runs)
    for run in runs:
        values = _numbers(run, f"{path}/density")
        fine = len(values) == len(grid) and min(values) >= 0 and max(values) > 0
        _need(fine, f"{path}/density", f"{len(grid)} numbers of 0 or more in each list", values)


def _check_surface(surface: Any, path: str, seeds: int) -> None:
    del seeds  # of one run
    x, y = (_numbers(_get(surface, name, path), f"{path}/{name}") for name in ("x", "y"))
    for name, steps in (("x", x), ("y", y)):
        fine = len(steps) > 1 and _rises(steps) and 0 in steps
        _need(fine, f"{path}/{name}", "at least two rising numbers, 0 among them", steps)
    rows = _list(_get(surface, "loss", path), f"{path}/loss")
    fine = len(rows) == len(x) and all(len(_numbers(row, f"{path}/loss")) == len(y) for row in rows)
    _need(fine, f"{path}/loss", f"{len(x)} lists of {len(y)} finite numbers", rows)


def _check_comparison(comparison: Any, path: str) -> None:
    for name in ("metric", "a", "b"):
        _check_text(_get(comparison, name, path), f"{path}/{name}")
    for name in ("difference", "low", "high", "p"):
        value = _get(comparison, name, path)
        _need(_is_number(value), f"{path}/{name}", "a finite number", value)
    _need(0 <= comparison["p"] <= 1, f"{path}/p", "a number between 0 and 1", comparison["p"])
    n = comparison.get("n", 1)
    counts = n if isinstance(n, Sequence) and not isinstance(n, str) else [n]
    _need(all(map(_is_count, counts)), f"{path}/n", "one number of repeats, or one per arm", n)
    _check_text(comparison.get("test", ""), f"{path}/test")


def _check_ratio(ratio: Any, path: str) -> None:
    low, median, high = (_get(ratio, name, path) for name in ("low", "median", "high"))
    ordered = all(map(_is_number, (low, median, high))) and 0 < low <= median <= high
    _need(ordered, path, "0 < low <= median <= high", ratio)


def _check_swept(sweep: Any, path: str) -> None:
    _check_text(_get(sweep, "name", path), f"{path}/name")
    swept = _numbers(_get(sweep, "values", path), f"{path}/values")
    _need(_rises(swept), f"{path}/values", "rising numbers", swept)
    arms = _get(sweep, "arms", path)
    _need(arms, f"{path}/arms", "at least one arm", arms)
    for arm, metrics in _items(arms, f"{path}/arms"):
        for metric, runs in _items(metrics, f"{path}/arms/{arm}"):
            where = f"{path}/arms/{arm}/{metric}"
            _need(
                len(_list(runs, where)) == len(swept),
                where,
                f"one list for each of {len(swept)} values",
                runs,
            )
            for run in runs:
                _numbers(run, where)


def _check_trial(trial: Any, path: str) -> None:
    number, settings, outcome, value, seconds = (
        _get(trial, name, path) for name in ("number", "settings", "outcome", "value", "seconds")
    )
    _need(_is_count(number), f"{path}/number", "a whole number of 0 or more", number)
    for flag, setting in _items(settings, f"{path}/settings"):
        plain = setting is None or isinstance(setting, bool | str) or _is_number(setting)
        _need(plain, f"{path}/settings/{flag}", "a number, a text, true, false or null", setting)
    _need(outcome in OUTCOMES, f"{path}/outcome", f"one of {', '.join(OUTCOMES)}", outcome)
    _need(value is None or _is_number(value), f"{path}/value", "a finite number or null", value)
    _need(
        value is not None or outcome != "finished", f"{path}/value", "a number, as the trial finished", value
    )
    _need(_is_number(seconds) and seconds >= 0, f"{path}/seconds", "a number of 0 or more", seconds)


def _check_overlay(overlay: Any, path: str) -> None:
    _check_text(_get(overlay, "title", path), f"{path}/title")
    image, values = (_array(_get(overlay, name, path)) for name in ("image", "map"))
    shaped = image.ndim == 3 and image.size > 0 and image.shape[-1] in (1, 3) and image.dtype.kind == "i"
    fine = shaped and image.min() >= 0 and image.max() <= 255
    _need(fine, f"{path}/image", "whole numbers from 0 to 255 as [height][width][1 or 3]", overlay["image"])
    fine = values.shape == image.shape[:2] and values.dtype.kind in "if" and np.isfinite(values).all()
    _need(fine, f"{path}/map", f"finite numbers as [{len(image)}][{image.shape[1]}]", overlay["map"])


def _check_together(content: Mapping[str, Any]) -> None:
    """Checks that fields fit each other."""
    matrices = content.get("confusion", {})
    names = _list(content.get("class_names", []), "class_names")
    for name in names:
        _check_text(name, "class_names")
    for arm, matrix in matrices.items():
        fits = not names or len(names) == len(matrix)
        _need(fits, "class_names", f"a name for each of the {len(matrix)} classes of confusion/{arm}", names)
    if content.get("trials"):
        _check_text(content.get("trials_metric"), "trials_metric")
        numbers = [trial["number"] for trial in content["trials"]]
        _need(len(set(numbers)) == len(numbers), "trials", "a number of its own for each trial", numbers)


def _check_finite(content: Mapping[str, Any]) -> None:
    """Refuses NaN and infinity in every field, also in an experiment's own: JSON has no name for them."""
    try:
        json.dumps(content, allow_nan=False, default=str)  # much faster than the walk
    except ValueError:
        for field, value in content.items():
            _find_infinite(value, field)


def _find_infinite(value: Any, path: str) -> None:
    if isinstance(value, float):
        _need(_is_number(value), path, "a finite number", value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _find_infinite(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _find_infinite(inner, path)


def _need(fine: Any, path: str, needed: str, got: Any) -> None:
    if not fine:
        raise ValueError(f"{path} needs {needed}, got {reprlib.repr(got)}.")


def _items(value: Any, path: str) -> list[tuple[str, Any]]:
    _need(isinstance(value, Mapping) and all(isinstance(k, str) for k in value), path, "an object", value)
    return list(value.items())


def _get(value: Any, name: str, path: str) -> Any:
    _need(isinstance(value, Mapping) and name in value, path, f"an object with {name!r}", value)
    return value[name]


def _list(value: Any, path: str) -> Sequence[Any]:
    # JSON writes a tuple as a list.
    _need(isinstance(value, list | tuple), path, "a list", value)
    return value


def _numbers(value: Any, path: str) -> Sequence[float]:
    fine = isinstance(value, list | tuple) and value and _are_numbers(value)
    _need(fine, path, "a non-empty list of finite numbers", value)
    return value


def _check_text(value: Any, path: str) -> None:
    _need(isinstance(value, str), path, "a text", value)


def _array(value: Any) -> np.ndarray:
    """Nested lists as an array; an empty one if they are ragged."""
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        return np.empty(0)


def _is_number(value: Any) -> bool:
    return _are_numbers([value])


def _are_numbers(values: Sequence[Any]) -> bool:
    # In Python True is an int; comparisons with NaN are false.
    return all(
        isinstance(v, int | float) and not isinstance(v, bool) and -_INFINITE < v < _INFINITE for v in values
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _is_size(text: str) -> bool:
    """Whether a text is the size of a perturbation, such as "3" or "0.1"."""
    try:
        return _is_number(float(text))
    except ValueError:
        return False


def _rises(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _listed(names: Any) -> str:
    return ", ".join(list(names)[:8]) or "it has none"
