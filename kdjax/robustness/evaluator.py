"""All perturbations of one network, in two compiled programs."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kdjax import data, evaluate, parallel
from kdjax.robustness import attacks
from kdjax.robustness.corruptions import CORRUPTIONS, Corruption, check_severities
from kdjax.types import ApplyFn, ModelState, Params


def make_evaluator(
    apply_fn: ApplyFn,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    devices: Sequence[jax.Device],
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    weight_noise: Sequence[float] = attacks.WEIGHT_NOISE,
    draws: int = 5,
    epsilons: Sequence[float] = attacks.EPSILONS,
    metrics: Sequence[str] = ("accuracy",),
) -> Callable[[Params, ModelState, Array], dict[str, float]]:
    """Builds a function of the weights that returns a network's metrics under each perturbation.

    Compiles the network twice, forward for all corruptions and weights, and with its gradient for all attacks; never
    again for other weights. Corrupted images are truncated to 8 bits as in CIFAR-10-C, attacked ones are not.

    Args:
      apply_fn: the network; called with ``train=False``.
      images: uint8[n, height, width, channels], the test split.
      labels: int[n], true classes.
      mean: of the normalisation that the network expects, per channel on the scale [0, 1].
      std: of the same normalisation.
      batch_size: examples per call over all devices; changes memory and speed, not the answer.
      devices: of this process.
      corruptions: by name; ``{}`` for none.
      severities: of every corruption.
      weight_noise: relative standard deviations for :func:`perturb_weights`; ``()`` for none.
      draws: noisy weights per deviation, over which each metric is averaged; the same draws for every deviation.
      epsilons: largest change of a pixel by FGSM and PGD, in grey levels of 255; ``()`` for no attack.
      metrics: those of :func:`kdjax.evaluate.summarise` to return.

    Returns:
      ``(params, model_state, key) -> {name: value}`` with plain floats. Accuracies have the names "clean",
      "gaussian_noise/3" (severity), "mean_corruption" (over all ``corruptions`` and ``severities``; unlike the mean
      corruption error of CIFAR-10-C, which has other corruptions and is relative to a baseline), "weight_noise/0.1"
      (relative deviation), "fgsm/8" and "pgd/8" (grey levels). Another metric's name is appended:
      "gaussian_noise/3/ece".

    Raises:
      ValueError: if images, labels and normalisation do not fit together, or a setting is out of range. The returned
        function: if there is no such metric.
    """
    _check_data(images, labels, mean, std)
    check_severities(severities, corruptions)
    if any(not 0 <= epsilon <= 255 for epsilon in epsilons):
        raise ValueError(
            f"epsilons are grey levels between 0 and 255, got {tuple(epsilons)}; 8 is the usual one for CIFAR-10."
        )
    resident = {"image": images, "label": np.asarray(labels, np.int32), "key": jax.random.key(0)}
    resident = parallel.replicate(resident, devices)
    size = {"ids": np.arange(len(images)), "batch_size": batch_size, "devices": devices}
    scale = {"mean": mean, "std": std}
    corrupted = {
        (name, severity): _changes(corruption, images, severity)
        for name, corruption in corruptions.items()
        for severity in severities
    }
    corrupted_sums = _corruption_evaluator(apply_fn, resident, corruptions, scale, size)
    attacked_sums = _attack_evaluator(apply_fn, resident, scale, size)
    perturb = jax.jit(attacks.perturb_weights)
    kinds = (("fgsm", 1, 1.0, False), ("pgd", attacks.PGD_STEPS, attacks.PGD_STEP_SIZE, True))

    def passes(params, model_state, key) -> Iterator[tuple[str, dict[str, Any]]]:
        image_key, weight_key = jax.random.split(key)
        arrays = resident | parallel.replicate({"key": image_key}, devices)
        yield "clean", corrupted_sums(params, model_state, arrays)
        for (name, severity), changes in corrupted.items():
            yield f"{name}/{severity}", corrupted_sums(params, model_state, arrays, name, changes)
        for sigma, draw in itertools.product(weight_noise, range(draws)):
            noisy = perturb(params, np.float32(sigma), jax.random.fold_in(weight_key, draw))
            yield f"weight_noise/{sigma:g}", corrupted_sums(noisy, model_state, arrays)
        for (name, steps, part, start), epsilon in itertools.product(kinds, epsilons):
            attack = _attack(epsilon / 255, steps, part * epsilon / 255, start)
            yield f"{name}/{epsilon:g}", attacked_sums(params, model_state, arrays | attack)

    def evaluate_all(params: Params, model_state: ModelState, key: Array) -> dict[str, float]:
        found: dict[str, list[dict[str, float]]] = {}
        for name, sums in passes(params, model_state, key):
            found.setdefault(name, []).append(_chosen(evaluate.summarise(sums), metrics))
        if corrupted:
            found["mean_corruption"] = [found[f"{name}/{severity}"][0] for name, severity in corrupted]
        return {
            name if metric == "accuracy" else f"{name}/{metric}": math.fsum(s[metric] for s in scores)
            / len(scores)
            for name, scores in found.items()
            for metric in metrics
        }

    return evaluate_all


def _corruption_evaluator(
    apply_fn: ApplyFn,
    resident: dict[str, Any],
    corruptions: Mapping[str, Corruption],
    scale: dict[str, Any],
    size: dict[str, Any],
) -> Callable[..., dict[str, Any]]:
    """Builds ``(params, model_state, arrays, name, changes) -> sums``, one program for all corruptions and none."""
    names = [name for name, corruption in corruptions.items() if not corruption.on_host]
    functions = [lambda x, strength, keys: x, *(corruptions[name].function for name in names)]
    number = {name: np.int32(i) for i, name in enumerate(names, 1)}
    plain = {"function": np.int32(0), "strength": np.float32(0)}

    def make_batch(arrays, index):
        x, keys = _pixels(arrays, index)
        x = jax.lax.switch(arrays["function"], functions, x, arrays["strength"], keys)
        return {"image": data.normalise(_levels(x), **scale), "label": arrays["label"][index]}

    sums_of = evaluate.make_evaluator(apply_fn, make_batch, resident | plain, **size)

    def run(params, model_state, arrays, name="", changes: Mapping[str, Any] = plain):
        if "image" in changes:
            changes = parallel.replicate(changes, size["devices"])
        chosen = plain | {"function": number.get(name, plain["function"])}
        return sums_of(params, model_state, arrays | chosen | changes)

    return run


def _attack_evaluator(
    apply_fn: ApplyFn, resident: dict[str, Any], scale: dict[str, Any], size: dict[str, Any]
) -> Callable[..., dict[str, Any]]:
    """Builds ``(params, model_state, arrays) -> sums`` where ``arrays`` hold an :func:`_attack`."""

    def make_batch(arrays, index):
        x, keys = _pixels(arrays, index)
        label = arrays["label"][index]
        return {"image": {"x": x, "keys": keys, "label": label, **arrays["attack"]}, "label": label}

    def attacked(params, model_state, inputs, *, train, key=None):
        x, label, epsilon = inputs["x"], inputs["label"], inputs["epsilon"]
        start = x + inputs["start"] * epsilon * attacks.offset(inputs["keys"], x)
        how = {"epsilon": epsilon, "steps": inputs["steps"], "step_size": inputs["step_size"]}
        x = attacks.attack(apply_fn, params, model_state, x, label, start, **how, **scale)
        return apply_fn(params, model_state, data.normalise(255 * x, **scale), train=train)

    return evaluate.make_evaluator(attacked, make_batch, resident | _attack(0.0, 1, 0.0, False), **size)


def _attack(epsilon: float, steps: int, step_size: float, start: bool) -> dict[str, Any]:
    """An attack as arguments of the program that runs them all; ``start``: whether it starts at random."""
    numbers = {"epsilon": np.float32(epsilon), "step_size": np.float32(step_size), "start": np.float32(start)}
    return {"attack": numbers | {"steps": np.int32(steps)}}


def _changes(corruption: Corruption, images: np.ndarray, severity: int) -> dict[str, Any]:
    """The strength of a severity, or the corrupted images if the host computes them."""
    strength = corruption.strengths[severity - 1]
    if not corruption.on_host:
        return {"strength": np.float32(strength)}
    corrupted = corruption.function(jnp.asarray(images, jnp.float32) / 255, strength, None)
    return {"image": np.asarray(_levels(corrupted)).astype(np.uint8)}


def _pixels(arrays: Mapping[str, Any], index: Array) -> tuple[Array, Array]:
    """Images in [0, 1] and a key for each, which depends on its index alone."""
    return arrays["image"][index].astype(jnp.float32) / 255, data.example_keys(arrays["key"], index)


def _levels(images: Array) -> Array:
    """Images in [0, 1] as whole grey levels, truncated as in CIFAR-10-C, but not by a float's rounding error."""
    return jnp.floor(255 * images + 1e-3)


def _chosen(scores: Mapping[str, float], metrics: Sequence[str]) -> dict[str, float]:
    if unknown := [metric for metric in metrics if metric not in scores]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(scores)}.")
    return {metric: scores[metric] for metric in metrics}


def _check_data(images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8 of shape [n, height, width, channels], got {images.dtype} of shape {images.shape}."
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images need as many labels, got labels of shape {labels.shape}.")
    if not len(mean) == len(std) == images.shape[-1]:
        raise ValueError(
            f"mean and std need one number for each of the {images.shape[-1]} channels, got {mean} and {std}."
        )
