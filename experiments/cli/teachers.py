"""The teacher that a command line names: trained in the workdir, taken up from an earlier run, or a file of answers."""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments.cli.inputs import Data, network
from experiments.cli.options import Flags, Launch, define, refuse_given
from experiments.cli.workdirs import shared_cache
from kdjax import checkpoints, data, methods, parallel, run
from kdjax import recipe as recipes
from kdjax import teacher as signals
from kdjax.callbacks import Callback, bar
from kdjax.models import Network
from kdjax.options import option
from kdjax.recipe import Machine, Recipe
from kdjax.teacher import TeacherSignal
from kdjax.types import Outputs, Weights

flags.disclaim_key_flags()  # so that --help lists what is defined here as the experiment's own


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Which teacher, and how it is trained unless it is there already.

    Attributes:
      recipe: of its training.
      training_flags: names of the flags that decide it.
    """

    teacher: str = option("digits_teacher", "A name in kdjax.models.MODELS, or path/mine.py:build.")
    teacher_dir: str | None = option(None, "Take up this trained teacher, such as runs/one/teacher/0.")
    teacher_answers: str | None = option(
        None, "An .npz with a teacher's logits, and features by name; see kdjax.teacher.from_file."
    )
    teacher_num_train: int | None = option(
        None, "Training images of teachers; 0 for all, those of the students by default.", least=0
    )
    teacher_label_noise: str = option(
        "same",
        "same: teachers are trained on the wrong labels of --label_noise as well; clean: on the true labels.",
        choices=("same", "clean"),
    )
    teacher_label_smoothing: float = option(
        0.0, "Share of each label that teachers learn to spread over all classes.", least=0.0, most=0.99
    )
    teacher_untrained: bool = option(
        False, "Leave teachers as they are initialised: what soft targets do when nothing was learnt."
    )
    teacher_seeds: int = option(1, "Teachers; the students take turns among them.", least=1)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    training_flags: tuple[str, ...] = ()


def define_teacher(
    recipe: Recipe | Flags[Recipe],
    *,
    only: Collection[str] = (),
    defaults: Teacher | None = None,
    omit: Collection[str] = (),
) -> Flags[Teacher]:
    """Defines ``--teacher``, ``--teacher_dir``, ``--teacher_answers`` and the flags of a teacher's training.

    ``recipe`` is the teacher's, or the flags of the students', as in :func:`define`; its fields, or ``only`` some,
    become ``--teacher_FIELD``. The other flags have ``defaults``; ``omit`` fields of :class:`Teacher` get no flag.
    """
    omit = {*omit, "recipe", "training_flags"}
    which, how = define(defaults or Teacher(), omit=omit), define(recipe, prefix="teacher_", only=only)
    names = {field.name for field in dataclasses.fields(Teacher)} - omit - {"teacher_dir", "teacher_answers"}
    names |= {f"teacher_{name}" for name in only or (field.name for field in dataclasses.fields(Recipe))}
    decide = tuple(sorted(names))
    return Flags(Teacher, lambda: dataclasses.replace(which.value, recipe=how.value, training_flags=decide))


class Teachers(NamedTuple):
    """The teachers of a study before they are trained.

    Attributes:
      name: of their network, or of the file of answers.
      shapes: of what each returns for a batch.
      to_train: how many networks will be trained, for :func:`check_disk`.
      settings: those of the study, with None for what decides the training of a teacher that is there already.
      made_from: for :func:`claim_workdir`.
      train: ``(workdir, callbacks=()) -> [Trained]``, one per seed; it reads back those that are trained already.
      answers: of --teacher_answers; nothing is trained then.
    """

    name: str
    shapes: Outputs
    to_train: dict[Network, int]
    settings: dict[str, Any]
    made_from: dict[str, Any]
    train: Callable[..., list[run.Trained]]
    answers: Sequence[TeacherSignal] = ()

    def cache_bytes(self, num_images: int, features: Sequence[str] = ()) -> int:
        """What the teachers' answers about so many images take on disk: logits, and features by name."""
        if self.answers:
            return 0
        numbers = self.shapes.logits.shape[-1]
        numbers += sum(math.prod(self.shapes.features[name].shape[1:]) for name in features)
        return (2 if features else 4) * numbers * num_images * max(1, sum(self.to_train.values()))


def teachers(
    teacher: Teacher,
    source: Data,
    dataset: data.Dataset,
    *,
    launch: Launch,
    settings: Mapping[str, Any],
    machine: Machine,
    **fields: Any,
) -> Teachers:
    """Loads the teacher or the answers that are given, or prepares to train; writes nothing, so that it can refuse.

    The teacher's own training images come from ``source``; ``dataset`` and ``settings`` are those of the study, and
    ``fields`` are of the teacher's network, such as ``dtype``.

    Raises:
      ValueError: if there is no such teacher, it does not fit the data, or flags decide nothing beside those given.
    """
    made_from = {**settings, "data": dataset.fingerprint}
    if (path := teacher.teacher_answers) is not None:
        refuse_given(("teacher_dir", *teacher.training_flags), "--teacher_answers brings its own teacher")
        signal = signals.from_file(path, dataset, loaded=source.read())
        settings = {**settings, **dict.fromkeys(teacher.training_flags)}
        made_from |= {**settings, "answers": signal.identity}
        return Teachers(path, signal.shapes, {}, settings, made_from, lambda *_, **__: [], [signal])
    if teacher.teacher_dir is not None:
        found = _taken_up(teacher, dataset, split=launch.split, machine=machine, **fields)
        settings = {**settings, **dict.fromkeys(teacher.training_flags), "teacher": found.network.name}
        made_from |= {**settings, "teacher_weights": checkpoints.digest_tree(found.weights)}
        return _of(found.network, {}, settings, made_from, lambda *_, **__: [found])
    own, recipe, changes = dataset, teacher.recipe, {}
    if teacher.teacher_num_train is not None:
        changes["num_train"] = teacher.teacher_num_train
    if teacher.teacher_label_noise == "clean":
        if not source.label_noise:
            raise ValueError(
                "--teacher_label_noise=clean would change nothing: --label_noise=0 makes no label wrong."
            )
        changes["label_noise"] = 0.0
    if changes:
        own = source.load(at_most=256 if launch.smoke else None, **changes)
    net = network(teacher.teacher, own, **fields)
    if teacher.teacher_untrained:
        decide = {*teacher.training_flags} - {"teacher", "teacher_untrained", "teacher_seeds"}
        refuse_given(sorted(decide), "--teacher_untrained trains no teacher")
    recipes.check(recipe, len(own.splits["train"]), of="the teacher's")
    parallel.check_batch_size(recipe.batch_size, parallel.local_devices(machine.devices))

    smoothing, method = teacher.teacher_label_smoothing, methods.labels()
    if smoothing:
        method = methods.label_smoothing_cross_entropy(smoothing=smoothing)

    def train(workdir: Path, callbacks: Sequence[Callback] = ()) -> list[run.Trained]:
        if teacher.teacher_untrained:
            weights = [Weights(*net.init(n)) for n in range(teacher.teacher_seeds)]
            options = {"split": launch.split, "machine": machine}
            return [run.measured("teacher", n, net, w, own, **options) for n, w in enumerate(weights)]
        trainer = run.make_trainer(net, method, own, recipe, machine=machine, split=launch.split)
        decides = {"network": dict(net.description), "recipe": dataclasses.asdict(recipe)}
        decides |= {"steps_per_dispatch": machine.steps_per_dispatch}
        decides |= {"label_smoothing": smoothing} if smoothing else {}
        with shared_cache(launch.shared_cache, workdir / "teacher", own.fingerprint, **decides) as home:
            homes = [home / str(seed) for seed in range(teacher.teacher_seeds)]
            return [trainer(n, own, arm="teacher", callbacks=callbacks) for n, own in enumerate(homes)]

    to_train = {net: teacher.teacher_seeds}
    return _of(net, to_train, dict(settings), made_from | {"teacher_data": own.fingerprint}, train)


def _of(network: Network, *fields: Any) -> Teachers:
    return Teachers(network.name, network.output_shapes, *fields)


def _taken_up(
    teacher: Teacher, dataset: data.Dataset, *, split: str, machine: Machine, **fields: Any
) -> run.Trained:
    """The teacher of ``--teacher_dir``; ``--teacher=mine.py:build`` says what its network is if it is a user's."""
    assert teacher.teacher_dir is not None
    theirs = ":" in teacher.teacher
    refused = [name for name in teacher.training_flags if not (theirs and name == "teacher")]
    refuse_given(refused, "--teacher_dir takes up a teacher that is trained already")
    if theirs:
        fields = {"network": network(teacher.teacher, dataset)}
    return run.load(teacher.teacher_dir, dataset, split=split, machine=machine, **fields)


def ask(
    teacher: run.Trained, dataset: data.Dataset, own: Path, *, launch: Launch, machine: Machine, **asked: Any
) -> TeacherSignal:
    """What a teacher says about every image, cached in the directory ``own`` or in --shared_cache.

    ``asked`` are arguments of :func:`kdjax.teacher.answers`, such as ``mode`` and ``features``.
    """
    decides = {"weights": checkpoints.digest_tree(teacher.weights), **asked}
    with (
        shared_cache(launch.shared_cache, own, dataset.fingerprint, **decides) as home,
        bar("teacher's answers", total=len(dataset.images), unit="image") as meter,
    ):
        asked |= {"directory": home, "devices": parallel.local_devices(machine.devices)}
        asked["progress"] = lambda done, total: meter.update(done - meter.n)
        return signals.answers(teacher, dataset, **asked)
