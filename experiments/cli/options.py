"""Flags made from dataclasses, and the flags that all experiments share: each is defined once and means one thing."""

import contextlib
import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from absl import flags
from absl.testing import flagsaver

from kdjax.data.batches import MAX_SEED
from kdjax.options import option
from kdjax.recipe import Recipe

T = TypeVar("T")

flags.disclaim_key_flags()  # so that --help lists what is defined here as the experiment's own

MAY_CHANGE = {
    *("workdir", "output", "supersedes", "shared_cache", "data_dir"),
    *("jobs", "pod", "tensorboard", "devices", "save_every_s", "chosen_on"),
}
"""Flags that say where and how fast something is computed, or why, not what: they may change when a run is resumed."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """What a launch needs beside its data, its networks and its recipe."""

    workdir: str = option(None, "Where everything is written.")  # required
    output: str | None = option(None, "Also write the results to this file.")
    supersedes: str = option(
        "", "Why this result supersedes the one in --output, which is kept in history/ beside it."
    )
    split: str = option(
        "test",
        "Split of the final numbers; validation while settings are chosen, which leaves the test split unread.",
        choices=("test", "validation"),
    )
    shared_cache: str | None = option(
        None,
        "Where runs share teachers, and their cached answers, of equal settings; the workdir by default.",
    )
    jobs: int = option(1, "Processes that train side by side.", least=1)
    pod: bool = option(False, "Join the processes of a TPU pod or cluster job first.")
    tensorboard: bool = option(False, "Write every epoch's numbers to workdir/tensorboard.")
    scaled_down: str = option("", "What is smaller than in the study followed; kept with the result.")
    chosen_on: str = option("", "What was chosen before, and on which data; kept with the result.")
    smoke: bool = option(False, "The same code in seconds: few images, epochs and seeds.")

    def shorten(self, recipe: Recipe, *, epochs: int) -> Recipe:
        """The recipe, with that many epochs in a smoke run."""
        return dataclasses.replace(recipe, epochs=epochs) if self.smoke else recipe


@dataclasses.dataclass(frozen=True)
class Flags(Generic[T]):
    """Flags that together make one value of the class ``kind``; it is made anew whenever ``value`` is read."""

    kind: type[T]
    make: Callable[[], T]

    @property
    def value(self) -> T:
        """What the flags say; a ValueError where they contradict each other."""
        return self.make()


def define(
    defaults: T | Flags[T], *, prefix: str = "", only: Collection[str] = (), omit: Collection[str] = ()
) -> Flags[T]:
    """Defines a flag for each field of a dataclass: its type, range and help are those of the field.

    A field whose annotation does not admit its default None becomes a flag that must be given.

    Args:
      defaults: an instance, which holds the defaults; or what another call returned, whose values stand in for flags
        that are not given, as in ``define(RECIPE, prefix="teacher_")``: the teacher is trained as the student is.
      prefix: of the flags' names.
      only: the fields to define, all by default; the others are as in ``defaults``.
      omit: fields not to define.
    """
    base: Any = defaults if isinstance(defaults, Flags) else Flags(type(defaults), lambda: defaults)
    hints, inherits, fields = typing.get_type_hints(base.kind), base is defaults, {}
    for field in dataclasses.fields(base.kind):
        if field.name not in omit and (not only or field.name in only):
            fields[field.name], said = hints[field.name], dict(field.metadata)
            if inherits:
                said["help"] += f" As --{field.name} by default."
            default = None if inherits else getattr(defaults, field.name)
            _define(prefix + field.name, hints[field.name], default, said, may_be_none=inherits)

    def make() -> Any:
        values = {name: _converted(prefix + name, hint) for name, hint in fields.items()}
        try:
            given = {name: value for name, value in values.items() if not (inherits and value is None)}
            return dataclasses.replace(base.value, **given)
        except ValueError as error:
            of_flag = str(error).partition("=")[0] in fields
            raise ValueError(f"--{prefix}{error}" if of_flag else str(error)) from error

    return Flags(base.kind, make)


def _define(name: str, hint: Any, default: Any, said: Mapping[str, Any], *, may_be_none: bool) -> None:
    """Defines one flag of the type that a field is annotated with."""
    kind, optional = _without_none(hint)
    options: dict[str, Any] = {"required": default is None and not (optional or may_be_none)}
    if said.get("choices"):
        flags.DEFINE_enum(name, default, list(said["choices"]), said["help"], **options)
        return
    if kind in (int, float):
        options |= {"lower_bound": said.get("least"), "upper_bound": said.get("most")}
    elif typing.get_origin(kind) is tuple:
        default = default if default is None else list(map(str, default))
    of_kind = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    of_kind.get(kind, flags.DEFINE_list)(name, default, said["help"], **options)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """``X`` and True of the annotation ``X | None``; any other as it is, and False."""
    among = typing.get_args(hint)
    if type(None) not in among:
        return hint, False
    return next(one for one in among if one is not type(None)), True


def _converted(name: str, hint: Any) -> Any:
    """The value of a flag as the field has it: a list as a tuple of its items."""
    value, (kind, _) = flags.FLAGS[name].value, _without_none(hint)
    if typing.get_origin(kind) is not tuple or value is None:
        return value
    item = typing.get_args(kind)[0]
    try:
        return tuple(item(part) for part in value)
    except ValueError:
        said = {int: "whole numbers", float: "numbers"}[item]
        raise ValueError(f"--{name}={','.join(value)} must be {said}, separated by commas.") from None


# One concept in all experiments.


def define_seeds(default: str = "0,1,2,3,4") -> Flags[list[int]]:
    """Defines ``--seeds``: different whole numbers."""
    flags.DEFINE_list("seeds", default, "One run of each arm per seed.")
    return Flags(list, lambda: parse_seeds(flags.FLAGS.seeds))


def parse_seeds(values: Sequence[str], flag: str = "seeds") -> list[int]:
    """Seeds as numbers; a ValueError unless they are different and fit into 32 bits."""
    try:
        seeds = [int(seed) for seed in values]
    except ValueError as error:
        raise ValueError(f"--{flag}={','.join(values)} must be whole numbers, such as 0,1,2.") from error
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > MAX_SEED:
        raise ValueError(f"--{flag}={','.join(values)} must be different numbers from 0 to {MAX_SEED}.")
    return seeds


def define_arms(
    known: Sequence[str] = (),
    *,
    default: Sequence[str] = (),
    baseline: str | None = None,
    help: str = "Some of the arms above; all by default.",
) -> Flags[list[str]]:
    """Defines ``--arms``; its value is a list of names, among which must be the ``baseline``.

    With the ``known`` arms of a study, the value is in their order, all of them by default, and may change when a run
    is resumed, since every run is identified by its own arm. Without them the experiment checks what is given.
    """
    holder = flags.DEFINE_list("arms", list(default), help)
    if not known:
        return Flags(list, lambda: list(flags.FLAGS.arms))
    may_change(holder)

    def make() -> list[str]:
        wanted = flags.FLAGS.arms
        said = f"--arms={','.join(wanted)}"
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"{said}: there is no arm {unknown[0]!r}; there are {', '.join(known)}.")
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"{said} must name different arms.")
        if wanted and baseline is not None and baseline not in wanted:
            raise ValueError(f"{said} must include {baseline}, with which the others are compared.")
        return [name for name in known if not wanted or name in wanted]

    return Flags(list, make)


def parse_weights(items: Sequence[str], arms: Sequence[str]) -> dict[str, float]:
    """``--weights`` as numbers by method; a ValueError unless each is of a method of some arm."""
    said, found = f"--weights={','.join(items)}", {}
    used = {part for arm in arms for part in arm.split("+")} - {"scratch", "kd"}
    for item in items:
        name, _, value = item.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(f"{said}: {item} must be NAME=NUMBER with a number from 0 on, such as hint=50.")
        if name not in used or name in found:
            why = "has two weights" if name in found else "is no method of an arm; kd has --soft_weight"
            raise ValueError(f"{said}: {name} {why}.")
        found[name] = weight
    return found


# What the flags of an experiment are.


def flags_of(module: str) -> dict[str, flags.Flag]:
    """The flags of a module by name; an experiment asks for its own by ``__name__``."""
    name = sys.argv[0] if module == "__main__" else module  # as absl has it
    return {flag.name: flag for flag in flags.FLAGS.flags_by_module_dict().get(name, [])}


def settings(module: str) -> dict[str, Any]:
    """The flags of a module that decide its numbers: all but those that may change when a run is resumed."""
    return {
        name: flag.value
        for name, flag in sorted(flags_of(module).items())
        if name not in MAY_CHANGE and not getattr(flag, "may_change", False)
    }


@contextlib.contextmanager
def given(text: str, *, module: str, fixed: Collection[str] = ()) -> Iterator[None]:
    """Within it the flags of a module are as ``NAME=VALUE,NAME=VALUE`` says, beside those of the command line.

    Raises:
      ValueError: for what is no flag of the module, for one of those that are ``fixed`` or may change when a run is
        resumed, and for a value that the flag does not take.
    """
    values = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in settings(module) or name in fixed:
            known = ", ".join(sorted(settings(module).keys() - {*fixed}))
            raise ValueError(
                f"{item!r} of {text!r} must be NAME=VALUE with a flag that can be varied: {known}."
            )
        values[name] = value
    try:
        with flagsaver.as_parsed(**values):
            yield
    except flags.IllegalFlagValueError as error:
        raise ValueError(f"{text!r}: {error}") from error


def may_change(holder: flags.FlagHolder) -> flags.FlagHolder:
    """Lets a flag change when a run is resumed, as those of :data:`MAY_CHANGE` may; returns it."""
    flags.FLAGS[holder.name].may_change = True  # type: ignore
    return holder


def refuse_given(names: Iterable[str], because: str) -> None:
    """Refuses those of the flags that were given: they would change nothing, and yet be recorded."""
    found = (flags.FLAGS[name] for name in names)
    if given := [f"--{flag.name}={flag.value}" for flag in found if not flag.using_default_value]:
        raise ValueError(f"{' and '.join(given)} would change nothing: {because}.")
