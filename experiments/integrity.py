r"""Does a damaged or half-written file ever come back as wrong numbers?

    python -m experiments.integrity --output=experiments/results/integrity.json

Takes about twenty minutes on two cores. It writes a checkpoint of a student with its Adam state, and a teacher's cached
answers for the digits. Then, again and again, it changes one byte anywhere in their files, or cuts one file short, and
reads them. It does the same to any file of a small finished distillation, or removes a file or folder of it, or
replaces it by its namesake of another seed, arm or learning rate, and starts the run again. Each trial has one of three
outcomes: refused, with the file named; exact, bit for bit what was saved or measured (a change to white space does no
harm, and a run computes again what it can); or wrong. Cached answers are also shuffled and passed to `teacher.verify`.
Processes that only save, or only compute answers, are killed at random moments (SIGKILL); what they left is exact if it
is whole and no older than the last save that was announced. For comparison, Orbax alone reads what it wrote after the
same changes.

Expect no wrong outcome in any arm but orbax_alone_flipped, where about a third are.
"""

import contextlib
import functools
import io
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from experiments import cli
from kdjax import checkpoints, data, methods, models, results, run, study, teacher
from kdjax.recipe import Recipe

OUTPUT = flags.DEFINE_string("output", None, "Write the counts to this file.")
TRIALS = flags.DEFINE_integer("trials", 100, "Damaged reads per arm.", lower_bound=1)
KILLS = flags.DEFINE_integer("kills", 20, "Killed processes per arm.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the choice of bytes and moments.")
SMOKE = flags.DEFINE_bool("smoke", False, "The same code in seconds: 3 trials, 1 kill.")

ROW_CHUNK = 100


class Subject(NamedTuple):
    """Something on disk, and how to read it back: raises ValueError or returns whether it is exact."""

    directory: Path
    is_exact: Callable[[Path], bool]

    def after(self, change: Callable[[Path], Any]) -> str:
        """The outcome of reading a copy that was changed."""
        copy = self.directory.with_name("copy")
        shutil.copytree(self.directory, copy)
        try:
            change(copy)
            return outcome(lambda: self.is_exact(copy))
        finally:
            shutil.rmtree(copy)


def outcome(read: Callable[[], bool]) -> str:
    """What a read that returns whether its result is exact has come to."""
    try:
        return "exact" if read() else "wrong"
    except ValueError:
        return "refused"


def counted(outcomes: Iterable[str]) -> dict[str, int]:
    """Outcome → count."""
    return {"exact": 0, "refused": 0, "wrong": 0} | Counter(outcomes)


def same(a: Any, b: Any) -> bool:
    """Whether two trees agree in every bit."""
    return checkpoints.digest_tree(a) == checkpoints.digest_tree(b)


def student_state(seed: int) -> dict[str, Any]:
    """A student as a run saves it, a different one for every seed."""
    params, model_state = models.init(models.build("digits_student", num_classes=10), (8, 8, 1), seed=seed)
    state = {"params": params, "model_state": model_state, "opt_state": optax.adam(1e-3).init(params)}
    return state | {"step": jnp.int32(seed)}


def a_checkpoint(directory: Path) -> Subject:
    """One step of a run."""
    state, meta = student_state(1), {"epoch": 1, "history": [0.5, 0.25]}
    checkpoints.save(directory, 1, state, meta=meta)

    def is_exact(path):
        restored = checkpoints.restore(path, state)
        return restored is not None and restored.meta == meta and same(restored.tree, state)

    return Subject(directory, is_exact)


def orbax_alone(directory: Path) -> Subject:
    """The same state, written and read by Orbax without us."""
    import orbax.checkpoint as ocp

    state = student_state(1)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(directory.absolute() / "state", state)
    checkpointer.wait_until_finished()

    def is_exact(path):
        quiet = contextlib.redirect_stderr(io.StringIO())  # its threads print pages
        try:
            with quiet:
                return same(checkpointer.restore(path.absolute() / "state", state), state)
        except Exception as error:  # whatever it raises, it has not passed for the state
            raise ValueError(str(error)) from error

    return Subject(directory, is_exact)


def logits_of(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
    """The teacher whose answers are cached."""
    apply_fn = models.apply_fn(models.build("digits_teacher", num_classes=10))
    params, model_state = variables
    outputs, _ = apply_fn(params, model_state, jnp.asarray(images, jnp.float32) / 255, train=False, key=None)
    return {"logits": outputs.logits}


def precompute(directory: Path, progress: Callable[[int, int], None] | None = None) -> teacher.TeacherCache:
    """The answers for all digits."""
    return teacher.precompute(
        directory, logits_of, digits_teacher(), data.load("digits").images, settings={}, batch_size=ROW_CHUNK,
        chunk_size=ROW_CHUNK, progress=progress,
    )  # fmt: skip


def digits_teacher() -> tuple[Any, Any]:
    """An untrained teacher: these trials are about bytes."""
    return models.init(models.build("digits_teacher", num_classes=10), (8, 8, 1), seed=0)


def a_cache(directory: Path) -> Subject:
    """A cache of answers, read with its whole header."""
    cached = precompute(directory)
    header = teacher.describe(digits_teacher(), data.load("digits").images, settings={})

    def is_exact(path):
        loaded = teacher.load(path, header=header)
        return loaded.header == cached.header and same(loaded.arrays, cached.arrays)

    return Subject(directory, is_exact)


@functools.cache
def digits() -> data.Dataset:
    """A few of the digits."""
    return data.split(data.load("digits"), num_train=200, num_validation=100)


def distilled(workdir: Path, learning_rate: float = 2e-3) -> dict[str, Any]:
    """The numbers of a teacher and of two students by two methods, also with noisy weights; resumes what exists."""
    dataset, recipe = digits(), Recipe(epochs=2, batch_size=20, learning_rate=learning_rate)
    large, small = (cli.network(f"digits_{size}", dataset) for size in ("teacher", "student"))
    settings = {"learning_rate": learning_rate}
    kd = methods.kd(4.0, hard_weight=0.1, soft_weight=0.9)
    with cli.released():
        cli.claim_workdir(str(workdir), settings | {"data": dataset.fingerprint})
        train_teacher = run.make_trainer(large, methods.labels(), dataset, recipe)
        arms = {"teacher": [train_teacher(0, workdir / "teacher" / "0", arm="teacher")]}
        signal = teacher.answers(arms["teacher"][0], dataset, directory=workdir / "teacher_answers" / "0")
        for arm, method in {"scratch": methods.labels(), "kd": kd}.items():
            trainer = run.make_trainer(small, method, dataset, recipe, teacher=signal)
            homes = {seed: workdir / arm / str(seed) for seed in (0, 1)}
            arms[arm] = [trainer(seed, homes[seed], arm=arm, settings=settings) for seed in homes]
        noise = {"corruptions": {}, "weight_noise": (0.1,), "draws": 1, "epsilons": ()}
        robustness = study.robustness_of(dataset, arms, workdir / "robustness", **noise)
    weights = {arm: [checkpoints.digest_tree(one.weights) for one in runs] for arm, runs in arms.items()}
    metrics = {arm: [one.metrics for one in runs] for arm, runs in arms.items()}
    return {"metrics": metrics, "robustness": robustness, "weights": weights}


def a_run(directory: Path) -> Subject:
    """A finished study; exact if it ends with the same numbers when started again, and its networks can be loaded."""
    wanted = distilled(directory)

    def loads(path, arm):
        loaded = run.load(path / arm / "0", digits())
        return checkpoints.digest_tree(loaded.weights) == wanted["weights"][arm][0]

    def is_exact(path):
        return distilled(path) == wanted and all(loads(path, arm) for arm in ("teacher", "kd"))

    return Subject(directory, is_exact)


def flipped(content: bytes, chosen: random.Random) -> bytes:
    """One byte replaced by another."""
    changed = bytearray(content)
    changed[chosen.randrange(len(content))] ^= chosen.randrange(1, 256)
    return bytes(changed)


def cut(content: bytes, chosen: random.Random) -> bytes:
    """The beginning alone, perhaps nothing."""
    return content[: chosen.randrange(len(content))]


def damaged(
    subject: Subject,
    damage: Callable[[bytes, random.Random], bytes],
    trials: int,
    seed: int,
    *,
    by_size: bool = True,
) -> dict[str, int]:
    """Reads copies with one damaged file; every byte is equally likely, or else every file."""
    chosen = random.Random(seed)
    if not subject.is_exact(subject.directory):
        raise ValueError(f"{subject.directory.name} is not exact undamaged: its trials would mean nothing.")
    files = [path for path in sorted(subject.directory.rglob("*")) if path.is_file()]
    weights = [path.stat().st_size if by_size else 1 for path in files]

    def change(copy: Path) -> None:
        victim = copy / chosen.choices(files, weights)[0].relative_to(subject.directory)
        victim.write_bytes(damage(victim.read_bytes(), chosen))

    return counted(subject.after(change) for _ in range(trials))


def misplaced(subject: Subject, other: Path, trials: int, seed: int) -> dict[str, int]:
    """Resumes copies of a run with a file or folder removed, or replaced by its namesake of this or another run."""
    chosen, own = random.Random(seed), subject.directory
    names = [path.relative_to(own) for path in sorted(own.rglob("*"))]
    names = [n for n in names if "arrays" not in n.parts and not n.name.startswith((".", "chunk_"))]

    def change(copy: Path) -> None:
        name = chosen.choice(names)
        namesakes = [home / path for home in (own, other) for path in names if path.name == name.name]
        namesakes = [path for path in namesakes if path != own / name and path.exists()]
        shutil.rmtree(copy / name) if (copy / name).is_dir() else (copy / name).unlink()
        source = chosen.choice([None, *namesakes])
        if source is not None:
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)

    return counted(subject.after(change) for _ in range(trials))


def shuffled(directory: Path, trials: int, seed: int) -> dict[str, int]:
    """Caches whose rows belong to other images: does a sample of 64 recomputed rows tell?"""
    cached, images = precompute(directory), data.load("digits").images

    def is_noticed(trial: int) -> bool:
        order = np.random.default_rng([seed, trial]).permutation(len(cached.arrays["logits"]))
        other = cached._replace(arrays={name: rows[order] for name, rows in cached.arrays.items()})
        teacher.verify(other, logits_of, digits_teacher(), images, seed=trial)
        return False

    return counted(outcome(functools.partial(is_noticed, trial)) for trial in range(trials))


def killed(
    task: Callable[[Path], None], left: Callable[[Path, int], bool], workdir: Path, kills: int, seed: int
) -> dict[str, int]:
    """Runs ``task``, a function of this module that prints its progress, in processes killed at random moments.

    ``left`` returns whether a directory is exact after that much was announced; a ValueError if it is refused.
    """
    chosen, outcomes = random.Random(seed), []
    program = f"import sys; from experiments import integrity as i; i.{task.__name__}(i.Path(sys.argv[1]))"
    for kill in range(kills):
        directory = workdir / f"{task.__name__}_{kill}"
        command = [sys.executable, "-c", program, str(directory)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            announced = [process.stdout.readline() for _ in range(3)]
            time.sleep(chosen.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            announced += process.stdout.readlines()
        outcomes.append(outcome(functools.partial(left, directory, int(announced[-1]))))
        shutil.rmtree(directory)
    return counted(outcomes)


def save_until_killed(directory: Path) -> None:
    """Saves one state after another."""
    for step in range(1, 10_000):
        checkpoints.save(directory, step, student_state(step), meta={"step": step})
        print(step, flush=True)


def precompute_until_killed(directory: Path) -> None:
    """Computes the answers, slowed down a little."""

    def progress(done: int, total: int) -> None:
        print(done, flush=True)
        time.sleep(0.02)

    precompute(directory, progress)


def left_by_save(directory: Path, announced: int) -> bool:
    """The newest step is whole, and no older than announced."""
    restored = checkpoints.restore(directory, student_state(0))
    if restored is None or restored.step < announced:
        return False
    return restored.meta == {"step": restored.step} and same(restored.tree, student_state(restored.step))


def left_by_precompute(directory: Path, announced: int) -> bool:
    """The next call computes no announced row, and ends with the files of an uninterrupted one."""
    before = {path.name: path.stat().st_mtime_ns for path in directory.glob("chunk_*.npz")}
    precompute(directory)
    kept = all((directory / name).stat().st_mtime_ns == time_ns for name, time_ns in before.items())
    whole = directory.with_name("whole")
    if not whole.exists():
        precompute(whole)
    contents = ({path.name: path.read_bytes() for path in where.iterdir()} for where in (directory, whole))
    return kept and len(before) * ROW_CHUNK >= announced and next(contents) == next(contents)


def measure(workdir: Path, trials: int, kills: int, seed: int) -> dict[str, dict[str, int]]:
    """Arm → outcome → count."""
    checkpoint, cached = a_checkpoint(workdir / "checkpoint" / "run"), a_cache(workdir / "cache" / "digits")
    orbax, whole = orbax_alone(workdir / "orbax" / "run"), a_run(workdir / "run" / "run")
    few = -(-trials // 2)
    distilled(workdir / "run" / "other", learning_rate=1e-3)
    return {
        "checkpoint_flipped": damaged(checkpoint, flipped, trials, seed),
        "checkpoint_cut": damaged(checkpoint, cut, trials, seed),
        "cache_flipped": damaged(cached, flipped, trials, seed),
        "cache_cut": damaged(cached, cut, trials, seed),
        "cache_shuffled": shuffled(cached.directory, trials, seed),
        "run_flipped": damaged(whole, flipped, few, seed, by_size=False),
        "run_cut": damaged(whole, cut, few, seed, by_size=False),
        "run_misplaced": misplaced(whole, workdir / "run" / "other", few, seed),
        "save_killed": killed(save_until_killed, left_by_save, workdir, kills, seed),
        "precompute_killed": killed(precompute_until_killed, left_by_precompute, workdir, kills, seed),
        "orbax_alone_flipped": damaged(orbax, flipped, trials, seed),
    }


def main() -> None:
    """All arms, one table."""
    start = time.monotonic()
    logging.set_verbosity(logging.FATAL)  # Orbax reports the damage at length
    trials, kills = (3, 1) if SMOKE.value else (TRIALS.value, KILLS.value)
    with tempfile.TemporaryDirectory() as workdir, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = measure(Path(workdir), trials, kills, SEED.value)
    for arm, found in counts.items():
        cli.say(f"{arm:20} " + "  ".join(f"{name} {number:3d}" for name, number in found.items()))
    result = results.make(
        "integrity",
        question="Does a damaged, misplaced or half-written file ever come back as wrong numbers?",
        flags={"trials": trials, "kills": kills, "seed": SEED.value, "smoke": SMOKE.value},
        seeds=[SEED.value],
        arms={arm: {name: [number] for name, number in found.items()} for arm, found in counts.items()},
        wall_clock_s=time.monotonic() - start,
    )
    if OUTPUT.value:
        results.write(OUTPUT.value, result)
    if wrong := [arm for arm in counts if counts[arm]["wrong"] and arm != "orbax_alone_flipped"]:
        raise ValueError(f"wrong numbers came back unnoticed in {wrong}: please report this bug in kdjax.")


if __name__ == "__main__":
    cli.launch(main)
