"""The few shapes of data that pass between the stages: pytrees of arrays, nothing else."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Float, Int, PyTree

Scalar: TypeAlias = float | int | Float[Array, ""] | Int[Array, ""]
"""A number that may also be traced, so that a schedule can set it."""

Params: TypeAlias = PyTree
"""Trainable parameters, float32."""

ModelState: TypeAlias = Mapping[str, Any]
"""What a network keeps beside its parameters, such as batch statistics; ``{}`` where there is nothing."""

Batch: TypeAlias = Mapping[str, Array]
"""Arrays with one leading example axis: ``image``, ``label``, ``index``, and the teacher's answers. The train step adds
``step``, a scalar."""

Metrics: TypeAlias = dict[str, Array]
"""Named scalars of one step."""


class Normalisation(NamedTuple):
    """Mean and standard deviation per channel, of images scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Weights(NamedTuple):
    """What is evaluated and exported: parameters and statistics, without the optimizer."""

    params: Params
    model_state: ModelState


class Outputs(NamedTuple):
    """What a network returns: scores before the softmax, and the activations that a loss may ask for by name."""

    logits: Float[Array, "batch classes"]
    features: dict[str, Array]


@runtime_checkable
class ApplyFn(Protocol):
    """A network as a pure function, whatever framework built it.

    ``inputs`` are float images already normalised, or whatever else it takes. In training mode ``key`` drives dropout
    and the second result holds the updated statistics; in evaluation ``key`` may be None and the state comes back as it
    went in.
    """

    def __call__(
        self,
        params: Params,
        model_state: ModelState,
        inputs: PyTree,
        *,
        train: bool,
        key: jax.Array | None = None,
    ) -> tuple[Any, ModelState]:
        """Returns the outputs, usually :class:`Outputs`, and the state after the call."""
        ...
