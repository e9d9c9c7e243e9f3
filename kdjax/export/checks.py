"""Whether an exported file says what the network in JAX says, on images that it has to say it about."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from kdjax import data

IMAGES = 1000
"""On how many images a file is compared with JAX: those of the test split first."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a file may differ by from the network in JAX.

    Attributes:
      difference: largest of any logit, as a share of the range of JAX's logits, of a float file.
      accuracy_drop: of an int8 file, on test images, as a fraction.
    """

    difference: float = 1e-4
    accuracy_drop: float = 0.02


def images_of(
    dataset: data.Dataset,
) -> tuple[UInt8[np.ndarray, "n height width channels"], Int[np.ndarray, " n"]]:
    """:data:`IMAGES` test images; where there are fewer, others too, whose label here is -1."""
    test = dataset.splits["test"][:IMAGES]
    others = np.concatenate([dataset.splits[name] for name in ("validation", "train")])[: IMAGES - len(test)]
    labels = np.concatenate([dataset.labels[test], np.full(len(others), -1, dataset.labels.dtype)])
    return dataset.images[np.concatenate([test, others]).astype(np.int64)], labels


def compare(
    logits: Float[np.ndarray, "n classes"],
    reference: Float[np.ndarray, "n classes"],
    labels: Int[np.ndarray, " n"],
) -> dict[str, Any]:
    """How the logits of a file differ from those of JAX.

    Returns:
      ``images``; ``difference``, the largest of any logit as a share of the range of JAX's; ``agreement``, the share of
      images with the same class; and of ``test_images``, those with a label, ``accuracy`` and ``accuracy_jax``.
    """
    predicted, ours, labelled = logits.argmax(-1), reference.argmax(-1), labels >= 0
    spread = float(np.ptp(reference)) or 1.0
    found = {
        "images": len(logits),
        "difference": float(np.abs(logits - reference).max()) / spread,
        "agreement": float((predicted == ours).mean()),
        "test_images": int(labelled.sum()),
    }
    if labelled.any():
        found["accuracy"] = float((predicted == labels)[labelled].mean())
        found["accuracy_jax"] = float((ours == labels)[labelled].mean())
    return found


def accuracy_lost(found: Mapping[str, Any]) -> float:
    """By how much a file of :func:`compare` is less accurate than JAX; 0 where no image had a label."""
    return found.get("accuracy_jax", 0.0) - found.get("accuracy", 0.0)


def verdict(found: dict[str, Any], limits: Limits, *, quantised: bool) -> str:
    """Why a file must not be used; empty if it may be."""
    if not np.isfinite(found["difference"]):
        return "its logits are not finite"
    if not quantised and found["difference"] > limits.difference:
        return (
            f"a logit differs from JAX's by {found['difference']:.2g} of their range on {found['images']:,} images "
            f"(allowed: {limits.difference:g})"
        )
    drop = accuracy_lost(found)
    if quantised and drop > limits.accuracy_drop:
        return (
            f"it loses {100 * drop:.1f} points of accuracy on {found['test_images']:,} test images (allowed: "
            f"{100 * limits.accuracy_drop:g})"
        )
    return ""


def run(
    answer: Callable[[UInt8[np.ndarray, "batch height width channels"]], Float[np.ndarray, "batch classes"]],
    images: UInt8[np.ndarray, "n height width channels"],
    batch_size: int,
) -> Float[np.ndarray, "n classes"]:
    """Logits of images by a function of batches of one size; the last batch is filled up with its last image."""
    found = []
    for start in range(0, len(images), batch_size):
        some = images[start : start + batch_size]
        filled = np.concatenate([some, np.repeat(some[-1:], batch_size - len(some), 0)])
        found.append(np.asarray(answer(filled))[: len(some)])
    return np.concatenate(found)
