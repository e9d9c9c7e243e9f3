"""A network whose last layer is a linear probe of its embedding."""

from typing import Any

import jax
import jax.numpy as jnp

from kdjax.models.network import Network
from kdjax.representations import Probe
from kdjax.types import ModelState, Outputs, Params, Weights


def probed(network: Network, weights: Weights, probe: Probe) -> tuple[Network, Weights]:
    """Puts a linear probe in the place of a network's logits; its features stay as they are.

    The network's own last layer stays among the parameters, unused. :func:`kdjax.run.load` needs the probed network as
    ``network=``.

    Args:
      network: with the feature "embedding".
      weights: of the network.
      probe: of :func:`kdjax.representations.linear_probe`, on that feature.

    Returns:
      The network, whose logits are float32, and its weights, with the parameters ``{"network": ..., "probe": {"kernel",
      "bias"}}``. Initialised anew, its probe is zero.

    Raises:
      ValueError: if the network has no embedding as wide as the probe's.
    """
    width, num_classes = probe.kernel.shape
    shapes = {name: feature.shape[1:] for name, feature in network.output_shapes.features.items()}
    if shapes.get("embedding") != (width,):
        raise ValueError(
            f"this probe takes embeddings of width {width}, and the features of {network.name} have the shapes "
            f"{shapes}: fit it to this network's embedding."
        )
    values = {name: jnp.asarray(getattr(probe, name), jnp.float32) for name in ("kernel", "bias")}

    def init(seed: int) -> tuple[Params, ModelState]:
        params, model_state = network.init(seed)
        return _with(jax.tree.map(jnp.zeros_like, values), params), model_state

    def apply(
        params: Params, model_state: ModelState, inputs: Any, *, train: bool, key: jax.Array | None = None
    ) -> tuple[Outputs, ModelState]:
        outputs, model_state = network.apply(params["network"], model_state, inputs, train=train, key=key)
        embedding = outputs.features["embedding"].astype(jnp.float32)
        logits = embedding @ params["probe"]["kernel"] + params["probe"]["bias"][None]
        return Outputs(logits, outputs.features), model_state

    shapes_of = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in values.items()}
    inner = network.weight_shapes
    made = Network(
        init,
        apply,
        network.image_shape,
        {"class": "Probed", "network": dict(network.description), "num_classes": num_classes},
        f"{network.name}_probed",
        Weights(_with(shapes_of, inner.params), inner.model_state),
    )
    return made, Weights(_with(values, weights.params), weights.model_state)


def _with(probe: Any, params: Params) -> Params:
    return {"network": params, "probe": probe}
