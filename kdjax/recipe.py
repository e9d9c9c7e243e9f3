"""How a network is trained, whatever it is trained on: epochs, optimizer, schedule, augmentation."""

import dataclasses
from collections.abc import Callable, Mapping

import optax

from kdjax import transforms
from kdjax.options import option

LEAST_RATE = 1e-12  # of a learning rate: at 0 nothing is learnt

OPTIMIZERS: Mapping[str, Callable[["Recipe", optax.Schedule], optax.GradientTransformation]] = {
    "adam": lambda recipe, rate: optax.adamw(rate, weight_decay=recipe.weight_decay),
    "sgd": lambda recipe, rate: optax.chain(
        optax.add_decayed_weights(recipe.weight_decay), optax.sgd(rate, momentum=recipe.momentum)
    ),
}
SCHEDULES: Mapping[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    # 150, 180 and 210 of 240 epochs: the schedule of the CRD benchmark, at any length
    "step": lambda rate, steps: optax.piecewise_constant_schedule(
        rate, {round(steps * part): 0.1 for part in (0.625, 0.75, 0.875)}
    ),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    ``--help`` of every experiment lists the fields with their meaning; a sweep may vary each of them.
    """

    epochs: int = option(20, "Passes over the training split.", least=1)
    batch_size: int = option(64, "Images per step over all devices.", least=1)
    learning_rate: float = option(1e-3, "Peak learning rate.", least=LEAST_RATE)
    optimizer: str = option("adam", "adam is AdamW; sgd has momentum.", choices=tuple(OPTIMIZERS))
    schedule: str = option(
        "constant", "step: divided by 10 at 62.5, 75 and 87.5 %.", choices=tuple(SCHEDULES)
    )
    weight_decay: float = option(0.0, "L2 under sgd, decoupled under adam.", least=0.0)
    momentum: float = option(0.9, "Of sgd.", least=0.0, most=1.0)
    ema: float = option(
        0.0, "Decay of averaged weights, which are then evaluated; 0 for none.", least=0.0, most=1.0
    )
    accumulate: int = option(1, "Batches per update.", least=1)
    padding: int = option(0, "Pixels of the random crop; 4 is usual for CIFAR.", least=0)
    flip: bool = option(False, "Mirror images at random; not for writing.")
    mixup: float = option(0.0, "Alpha of mixup; 0 for none.", least=0.0)
    max_norm: float = option(0.0, "Bound on the norm of each unit's incoming weights; 0 for none.", least=0.0)
    evaluate_every: int = option(1, "Epochs between two validations.", least=1)

    def __post_init__(self) -> None:
        if self.ema == 1:
            raise ValueError("ema=1 would keep the first weights for ever; .99 to .9999 are usual.")

    @property
    def augments(self) -> bool:
        """Whether training images are cropped or mirrored at random."""
        return bool(self.padding or self.flip)


def make_optimizer(recipe: Recipe, *, steps: int) -> optax.GradientTransformation:
    """The recipe's Optax chain for a run of ``steps`` batches."""
    updates = steps // recipe.accumulate
    tx = OPTIMIZERS[recipe.optimizer](recipe, SCHEDULES[recipe.schedule](recipe.learning_rate, updates))
    if recipe.max_norm:
        tx = optax.chain(tx, transforms.max_norm(recipe.max_norm))
    if recipe.ema:
        tx = optax.chain(tx, transforms.parameter_ema(recipe.ema))
    return optax.MultiSteps(tx, recipe.accumulate).gradient_transformation() if recipe.accumulate > 1 else tx


def num_steps(recipe: Recipe, num_examples: int) -> int:
    """Batches of a whole training on that many examples."""
    return max(num_examples // recipe.batch_size, 1) * recipe.epochs


def check(recipe: Recipe, num_examples: int, *, of: str = "the students'") -> None:
    """Raises a ValueError if the recipe would never update a weight, or its optimizer refuses a setting."""
    batches = num_steps(recipe, num_examples)
    if batches < recipe.accumulate:
        raise ValueError(
            f"accumulate={recipe.accumulate} takes more batches for one update than {of} whole training has, which "
            f"is {batches}; use {batches} or less, or more epochs."
        )
    make_optimizer(recipe, steps=batches)


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a training runs, and how often it is saved; decides speed, not results."""

    devices: int | None = option(
        None, "Devices of this process to use, all by default; a CPU is divided into so many.", least=1
    )
    steps_per_dispatch: int = option(32, "Most steps that one call to the device runs.", least=1)
    save_every_s: float = option(60.0, "Least seconds between two checkpoints of a run.", least=0.0)
