"""The space of a sweep: which flags of an experiment are varied, and over which values."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import optuna
from absl import flags
from absl.testing import flagsaver
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from kdjax.data.tfds_cache import did_you_mean

Space = dict[str, BaseDistribution]


def read(parts: Sequence[str], known: Collection[str]) -> Space:
    """Reads ``name=low:high``, ``name=low:high:log`` and ``name=a|b|c``, for names in ``known``, which are flags.

    A flag of whole numbers is varied over whole numbers; the bounds belong to the range.

    Raises:
      ValueError: naming the first part that is not of this form, of no such flag, or impossible.
    """
    space: Space = {}
    for part in parts:
        name, equals, text = part.partition("=")
        if not equals or not text:
            raise ValueError(f"--space={part} must be NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A|B.")
        if name not in known:
            raise ValueError(f"--space={part}: there is no flag --{name} to vary.{did_you_mean(name, known)}")
        if name in space:
            raise ValueError(f"--space names {name} twice.")
        values = text.split("|")
        if len(set(values)) < len(values) or not all(values):
            raise ValueError(f"--space={part} must name different values, as in optimizer=adam|sgd.")
        space[name] = CategoricalDistribution(values) if len(values) > 1 else _range(part, name, text)
    if not space:
        raise ValueError("--space is empty; name what is to be varied, as in --space=temperature=1:20:log.")
    return space


def _range(part: str, name: str, text: str) -> BaseDistribution:
    parser = flags.FLAGS[name].parser
    if not isinstance(parser, flags.IntegerParser | flags.FloatParser):
        raise ValueError(f"--space={part}: --{name} is no number; list its values, as in {name}=A|B.")
    low_text, *rest = text.split(":")
    log = rest[1:] == ["log"]
    if len(rest) != 1 + log:
        raise ValueError(f"--space={part} must be {name}=LOW:HIGH or {name}=LOW:HIGH:log.")
    try:
        low, high = parser.parse(low_text), parser.parse(rest[0])
    except (TypeError, ValueError) as error:
        raise ValueError(f"--space={part}: --{name} refuses a bound: {error}.") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"--space={part} needs two numbers, the lower one first.")
    if log and low <= 0:
        raise ValueError(f"--space={part}: a logarithmic range begins above 0, not at {low}.")
    if isinstance(parser, flags.IntegerParser):
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(low, high, log=log)


def check(space: Space, experiment_check: Callable[[], Any]) -> None:
    """Tries every bound and every choice on the flags, and on what the experiment itself checks of them."""
    for name, over in space.items():
        ends = over.choices if isinstance(over, CategoricalDistribution) else (over.low, over.high)  # type: ignore
        for value in ends:
            try:
                with flags_set({name: value}):
                    experiment_check()
            except (flags.Error, ValueError) as error:
                raise ValueError(f"--space reaches {name}={value}: {error}") from error


def draw(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """The trial's value of every flag, drawn where it has none yet."""
    values = {}
    for name, over in space.items():
        if isinstance(over, CategoricalDistribution):
            values[name] = trial.suggest_categorical(name, over.choices)
        elif isinstance(over, IntDistribution):
            values[name] = trial.suggest_int(name, over.low, over.high, log=over.log)
        elif isinstance(over, FloatDistribution):
            values[name] = trial.suggest_float(name, over.low, over.high, log=over.log)
    return values


def flags_set(values: Mapping[str, Any]) -> Any:
    """A context in which the flags have these values, as if they stood on the command line."""
    return flagsaver.as_parsed(**{name: str(value) for name, value in values.items()})


def as_setting(name: str, value: Any) -> Any:
    """A drawn value as the flag has it, for the result: a choice of 16|32 is a number if the flag is one."""
    return flags.FLAGS[name].parser.parse(value) if isinstance(value, str) else value


def in_words(values: Mapping[str, Any]) -> str:
    """Values as a person reads them."""
    shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in sorted(values.items())}
    return ", ".join(f"{name} {value}" for name, value in shown.items())
