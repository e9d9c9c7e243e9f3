"""The checks of a result file, before it is written and after it is read.

An error names the field by its path, such as ``robustness/kd/fgsm/8``, what it needs, and what it holds.
"""

import contextlib
import itertools
import json
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kdjax.results import answers

SCHEMA = 2
REQUIRED = {
    **dict.fromkeys(("name", "question", "command", "created", "commit", "scaled_down"), str),
    **dict.fromkeys(("flags", "versions", "hardware", "arms"), dict),
    **{"schema": int, "seeds": list, "dirty": bool, "wall_clock_s": (int, float)},
}
OUTCOMES = ("finished", "pruned", "failed")
_INFINITE = 1e100  # larger than any measurement, and its square is still a float

# Takes a value, its path in the file and perhaps the number of seeds of its arm; raises a ValueError.
Check = Callable[..., object]


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
    _need(_is_count(version) and version > 0, "schema", f"a version from 1 to {SCHEMA}", version)
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
    for arm, metrics in _items(content["arms"], "arms"):
        for metric, values in _items(metrics, f"arms/{arm}"):
            _check_per_seed(values, f"{arm}/{metric}", seeds[arm])
    for field, checked in _PER_ARM.items():
        for arm, value in _items(content.get(field, {}), field):
            _check_arm(arm, field, seeds)
            checked(value, f"{field}/{arm}", seeds[arm])
    for field, checked in _LISTS.items():
        for i, value in enumerate(_list(content.get(field, []), field)):
            checked(value, f"{field}/{i}")
    for split, count in _items(content.get("examples", {}), "examples"):
        _need(_is_count(count), f"examples/{split}", "a number of examples", count)
    if "correct" in content:
        _check_correct(content["correct"], "correct", seeds)
    for peer, ratio in _items(content.get("ratios", {}), "ratios"):
        low, median, high = (_get(ratio, name, f"ratios/{peer}") for name in ("low", "median", "high"))
        ordered = _are_numbers([low, median, high]) and 0 < low <= median <= high
        _need(ordered, f"ratios/{peer}", "0 < low <= median <= high", ratio)
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
    _NUMBER(content["wall_clock_s"], "wall_clock_s")


def _checked_seeds(content: Mapping[str, Any]) -> dict[str, int]:
    """The number of seeds of each arm."""
    seeds, own, arms = content["seeds"], content.get("arm_seeds", {}), content["arms"]
    for path, found in [("seeds", seeds), *((f"arm_seeds/{a}", s) for a, s in _items(own, "arm_seeds"))]:
        _need(all(map(_is_whole, _list(found, path))), path, "whole numbers", found)
        _need(found or not arms, path, "at least one seed", found)
    for arm in own:
        _check_arm(arm, "arm_seeds", arms)
    return {arm: len(own.get(arm, seeds)) for arm in arms}


def _check_arm(arm: str, field: str, arms: Mapping[str, Any]) -> None:
    listed = ", ".join(list(arms)[:8]) or "it has none"
    _need(arm in arms, f"{field}/{arm}", f"an arm of the result ({listed})", arm)


def _check_per_seed(values: Any, path: str, seeds: int) -> None:
    if len(_list(values, path)) != seeds:
        raise ValueError(f"{path} has {len(values)} values for {seeds} seeds.")
    if not _are_numbers(values):
        raise ValueError(f"{path} holds a value that is no finite number: {reprlib.repr(values)}.")


def _check_curves(metrics: Any, path: str, seeds: int) -> None:
    needed = f"one non-empty list of finite numbers or null for each of the {seeds} seeds"
    for metric, runs in _items(metrics, path):
        _need(len(_list(runs, f"{path}/{metric}")) == seeds, f"{path}/{metric}", needed, runs)
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


def _check_calibration(bins: Any, path: str, _seeds: int) -> None:
    _BINS(bins, path)
    lengths = {len(bins[name]) for name in ("confidence", "accuracy", "count")}
    _need(len(lengths) == 1, path, "as many bins in each list", bins)


def _check_confusion(matrix: Any, path: str, _seeds: int) -> None:
    rows = _list(matrix, path)
    square = bool(rows) and all(isinstance(row, list) and len(row) == len(rows) for row in rows)
    _need(square, path, "a square matrix, true class by predicted class", matrix)
    counts = [v for row in rows for v in row]
    fine = _are_numbers(counts) and min(counts) >= 0 and any(counts)
    _need(fine, path, "counts of at least one example", matrix)


def _check_flatness(measures: Any, path: str, seeds: int) -> None:
    _get(measures, "loss", path)
    for name, values in _items(measures, path):
        form = re.fullmatch(r"\w+(/filter_normalised)?", name)
        _need(form, f"{path}/{name}", "a name of the form measure or measure/filter_normalised", name)
        _check_per_seed(values, f"{path}/{name}", seeds)


def _check_density(density: Any, path: str, _seeds: int) -> None:
    _object(grid=_RISING)(density, path)
    runs, points = _list(_get(density, "density", path), f"{path}/density"), len(density["grid"])
    _need(runs, f"{path}/density", "at least one list of densities", runs)
    for run in runs:
        _NUMBERS(run, f"{path}/density")
        fine = len(run) == points and min(run) >= 0 and max(run) > 0
        _need(fine, f"{path}/density", f"{points} numbers of 0 or more in each list", run)


def _check_surface(surface: Any, path: str, _seeds: int) -> None:
    _object(x=_AROUND_ZERO, y=_AROUND_ZERO)(surface, path)
    rows, (x, y) = _list(_get(surface, "loss", path), f"{path}/loss"), (surface["x"], surface["y"])
    for row in rows:
        _NUMBERS(row, f"{path}/loss")
    fine = len(rows) == len(x) and all(len(row) == len(y) for row in rows)
    _need(fine, f"{path}/loss", f"{len(x)} lists of {len(y)} finite numbers", rows)


def _check_comparison(comparison: Any, path: str) -> None:
    _COMPARISON(comparison, path)
    n = comparison.get("n", 1)
    counts = n if isinstance(n, list | tuple) else [n]
    _need(all(map(_is_count, counts)), f"{path}/n", "one number of repeats, or one per arm", n)
    _TEXT(comparison.get("test", ""), f"{path}/test")


def _check_correct(stored: Any, path: str, seeds: Mapping[str, int]) -> None:
    _CORRECT(stored, path)
    for arm, runs in stored["arms"].items():
        _check_arm(arm, f"{path}/arms", seeds)
        needed = f"the answers of {seeds[arm]} seeds to {stored['examples']} examples, packed"
        try:
            packed = [answers.unpack(run, stored["examples"]) for run in _list(runs, f"{path}/arms/{arm}")]
        except (ValueError, TypeError):
            packed = []
        _need(len(packed) == seeds[arm], f"{path}/arms/{arm}", needed, runs)


def _check_swept(sweep: Any, path: str) -> None:
    _SWEEP(sweep, path)
    arms, count = _get(sweep, "arms", path), len(sweep["values"])
    _need(arms, f"{path}/arms", "at least one arm", arms)
    for arm, metrics in _items(arms, f"{path}/arms"):
        for metric, runs in _items(metrics, f"{path}/arms/{arm}"):
            where = f"{path}/arms/{arm}/{metric}"
            _need(len(_list(runs, where)) == count, where, f"one list for each of {count} values", runs)
            for run in runs:
                _NUMBERS(run, where)


def _check_trial(trial: Any, path: str) -> None:
    _TRIAL(trial, path)
    for flag, setting in _items(trial["settings"], f"{path}/settings"):
        plain = setting is None or isinstance(setting, bool | str) or _is_number(setting)
        _need(plain, f"{path}/settings/{flag}", "a number, a text, true, false or null", setting)
    finished = trial["value"] is not None or trial["outcome"] != "finished"
    _need(finished, f"{path}/value", "a number, as the trial finished", None)


def _check_overlay(overlay: Any, path: str) -> None:
    _object(title=_TEXT)(overlay, path)
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
        _TEXT(name, "class_names")
    for arm, matrix in matrices.items():
        fits = not names or len(names) == len(matrix)
        _need(fits, "class_names", f"a name for each of the {len(matrix)} classes of confusion/{arm}", names)
    if content.get("trials"):
        _TEXT(content.get("trials_metric"), "trials_metric")
        numbers = [trial["number"] for trial in content["trials"]]
        _need(len(set(numbers)) == len(numbers), "trials", "a number of its own for each trial", numbers)


def _check_finite(content: Mapping[str, Any]) -> None:
    """Refuses NaN and infinity in every field, also in an experiment's own: JSON has no name for them."""
    with contextlib.suppress(ValueError):
        json.dumps(content, allow_nan=False, default=str)  # much faster than the walk
        return
    remaining = list(content.items())
    while remaining:
        path, value = remaining.pop()
        if isinstance(value, Mapping):
            remaining += [(f"{path}/{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            remaining += [(path, inner) for inner in value]
        elif isinstance(value, float):
            _NUMBER(value, path)


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


def _rule(needed: str, fine: Callable[[Any], Any], *, first: Check | None = None) -> Check:
    """A check that a value is ``fine``, after it has passed ``first``."""

    def check(value: Any, path: str, _seeds: int = 0) -> None:
        if first is not None:
            first(value, path)
        _need(fine(value), path, needed, value)

    return check


def _object(**fields: Check) -> Check:
    """A check that a value is an object with these fields, each of which passes its own check."""

    def check(value: Any, path: str, _seeds: int = 0) -> None:
        for name, checked in fields.items():
            checked(_get(value, name, path), f"{path}/{name}")

    return check


_TEXT = _rule("a text", lambda v: isinstance(v, str))
_NUMBER = _rule("a finite number", lambda v: _is_number(v))
_NUMBERS = _rule(
    "a non-empty list of finite numbers", lambda v: isinstance(v, list | tuple) and v and _are_numbers(v)
)
_RISING = _rule("at least two rising numbers", lambda v: len(v) > 1 and _rises(v), first=_NUMBERS)
_AROUND_ZERO = _rule(
    "at least two rising numbers, 0 among them", lambda v: len(v) > 1 and _rises(v) and 0 in v, first=_NUMBERS
)
_FRACTIONS = _rule("fractions between 0 and 1", lambda v: all(0 <= x <= 1 for x in v), first=_NUMBERS)
_BINS = _object(
    confidence=_FRACTIONS,
    accuracy=_FRACTIONS,
    count=_rule("counts of at least one example", lambda v: min(v) >= 0 and sum(v) > 0, first=_NUMBERS),
)
_SWEEP = _object(name=_TEXT, values=_rule("rising numbers", _rises, first=_NUMBERS))
_COMPARISON = _object(
    **dict.fromkeys(("metric", "a", "b"), _TEXT),
    **dict.fromkeys(("difference", "low", "high"), _NUMBER),
    p=_rule("a number between 0 and 1", lambda v: 0 <= v <= 1, first=_NUMBER),
)
_PLAN = _object(
    **dict.fromkeys(("declared", "metric", "baseline", "chosen_on"), _TEXT),
    primary=_rule(
        "a list of pairs of arms",
        lambda v: all(isinstance(p, list | tuple) and len(p) == 2 for p in v),
        first=_list,
    ),
    margin=_rule("a number above 0 or null", lambda v: v is None or (_is_number(v) and v > 0)),
)
_CORRECT = _object(split=_TEXT, examples=_rule("a number of examples", _is_count), arms=_items)
_TRIAL = _object(
    number=_rule("a whole number of 0 or more", _is_count),
    settings=_items,
    outcome=_rule(f"one of {', '.join(OUTCOMES)}", lambda v: v in OUTCOMES),
    value=_rule("a finite number or null", lambda v: v is None or _is_number(v)),
    seconds=_rule("a number of 0 or more", lambda v: _is_number(v) and v >= 0),
)
_PER_ARM: dict[str, Check] = {
    "curves": _check_curves,
    "robustness": _check_robustness,
    "calibration": _check_calibration,
    "confusion": _check_confusion,
    "costs": _object(
        parameters=_rule("a whole number above 0", lambda v: _is_count(v) and v > 0),
        latency_ms=_rule("milliseconds above 0", lambda v: min(v) > 0, first=_NUMBERS),
    ),
    "flatness": _check_flatness,
    "densities": _check_density,
    "surfaces": _check_surface,
}
_LISTS: dict[str, Check] = {
    "comparisons": _check_comparison,
    "plan": _PLAN,
    "supersedes": _object(result=_TEXT, why=_TEXT),
    "notes": _TEXT,
    "swept": _check_swept,
    "trials": _check_trial,
    "overlays": _check_overlay,
}
