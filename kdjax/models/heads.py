"""Small networks that stand beside a student while it is distilled, and are thrown away afterwards.

Their parameters join the student's in one pytree, so that one optimizer trains all of them and none is forgotten::

    head = heads.VidHead(features=teacher_channels)
    params = {"student": student_params, "head": head.init(key, student_map)["params"]}

    def objective(params, ...):
        mean, log_scale = head.apply({"params": params["head"]}, outputs.features["stage2"])
        loss = losses.vid(mean, teacher_map, log_scale=log_scale)

Those that normalise by the batch also keep "batch_stats", beside the student's own. A layer that a normalisation
follows has no bias: it would be subtracted again and never receive a gradient. Initialise with ``module.init``; the
loss that each belongs to is in :mod:`kdjax.losses`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kdjax.models.layers import Conv, batch_norm


class Regressor(nn.Module):
    """Brings a map of the student to the teacher's channels: 1x1 convolution, normalisation, ReLU.

    For :func:`kdjax.losses.hint`. Losses before the ReLU (:func:`kdjax.losses.ofd`,
    :func:`kdjax.losses.activation_boundary`) take it without its own: ``activation=lambda x: x``.

    Attributes:
      features: the teacher's channels.
      activation: applied last.
      axis_name: of the mapped axis over which batch statistics are averaged; None keeps each device's own.
      dtype: of the computation; parameters and batch statistics are float32.

    References:
      Romero et al., `FitNets <https://arxiv.org/abs/1412.6550>`_, 2015, section 2.2, in the form of Tian et al.,
      `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020; Heo et al., `A Comprehensive
      Overhaul of Feature Distillation <https://arxiv.org/abs/1904.01866>`_, 2019.
    """

    features: int
    activation: Callable[[Array], Array] = nn.relu
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width features"]:
        """Maps the student's features; training normalises by the batch and updates "batch_stats"."""
        x = Conv(self.features, 1, use_bias=False, dtype=self.dtype)(x)
        return self.activation(batch_norm(self, train=train)()(x))


class Embedding(nn.Module):
    """Projects features onto the unit sphere: flattened, one linear layer, divided by the 2-norm.

    For :func:`kdjax.losses.crd` and :func:`kdjax.losses.info_nce`: one for the student and one
    for the teacher, both trained. A row that the layer maps to zero stays zero and receives no gradient.

    Attributes:
      features: length of the embedding.
      dtype: of the linear layer; the norm and the embedding are float32.

    References:
      Tian, Krishnan, Isola, `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020,
      section 3. Default there: 128.
    """

    features: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch features"]:
        """Embeds features of any shape."""
        x = nn.Dense(self.features, dtype=self.dtype)(x.reshape(x.shape[0], -1)).astype(jnp.float32)
        energy = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        alive = energy > 1e-24
        return jnp.where(alive, x * jax.lax.rsqrt(jnp.where(alive, energy, 1)), 0)


class VidHead(nn.Module):
    """Predicts the teacher's map from the student's: its mean by three 1x1 convolutions, its scale per channel.

    For :func:`kdjax.losses.vid`. The convolutions have ReLUs between them and no bias. The scale is
    a parameter that no input reaches; it starts where the variance is ``initial_variance``.

    Attributes:
      features: the teacher's channels.
      initial_variance: σ² of every channel before training.
      smallest_variance: ε, the same that the loss is given.
      dtype: of the convolutions; parameters are float32.

    References:
      Ahn et al., `Variational Information Distillation <https://arxiv.org/abs/1904.05835>`_, 2019, in the form of Tian
      et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020. Default there:
      variance 5, ε 1e-5, as many hidden channels as the teacher's map has.
    """

    features: int
    initial_variance: float = 5.0
    smallest_variance: float = 1e-5
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not self.initial_variance > self.smallest_variance > 0:
            raise ValueError(
                "a VidHead needs an initial_variance above its smallest_variance above 0, got "
                f"{self.initial_variance} and {self.smallest_variance}; the authors start from 5 and 1e-5."
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width features"], Float[Array, " features"]]:
        """Returns the mean and the ``log_scale`` of the teacher's map."""
        conv = functools.partial(Conv, self.features, 1, use_bias=False, dtype=self.dtype)
        mean = conv()(nn.relu(conv()(nn.relu(conv()(x)))))
        start = math.log(math.expm1(self.initial_variance - self.smallest_variance))  # inverse of softplus
        return mean, self.param("log_scale", nn.initializers.constant(start), (self.features,), jnp.float32)


class FactorTranslator(nn.Module):
    """Translates a map of the student into factors: three 3x3 convolutions with normalisation and leaky ReLU.

    For :func:`kdjax.losses.factor_transfer`, trained with the student.

    Attributes:
      features: channels of the factors, those of the teacher's :class:`FactorParaphraser`.
      axis_name: of the mapped axis over which batch statistics are averaged; None keeps each device's own.
      dtype: of the computation; parameters and batch statistics are float32.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network <https://arxiv.org/abs/1802.04977>`_, 2018, with the normalisation
      of Tian et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020.
    """

    features: int
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], *, train: bool
    ) -> Float[Array, "batch height width features"]:
        """Translates; training normalises by the batch and updates "batch_stats"."""
        for channels in (x.shape[-1], self.features, self.features):
            x = Conv(channels, 3, use_bias=False, dtype=self.dtype)(x)
            x = nn.leaky_relu(batch_norm(self, train=train)()(x), 0.1)
        return x


class FactorParaphraser(nn.Module):
    """Autoencoder of a map of the teacher; what passes through its middle are the factors.

    For :func:`kdjax.losses.factor_transfer`. It is trained first, on the teacher alone, by
    ``losses.hint(reconstruction, teacher_map)``, and frozen then. Three 3x3 convolutions either way, with leaky ReLU
    after each; the decoder's, transposed of stride 1 in the original, are plain ones, of which they are a renaming.

    Attributes:
      features: channels of the factors; half of the teacher's in the paper.
      dtype: of the computation; parameters are float32.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network <https://arxiv.org/abs/1802.04977>`_, 2018.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width features"], Float[Array, "batch height width channels"]]:
        """Returns the factors and the reconstruction of the map."""
        channels = x.shape[-1]
        for width in (channels, self.features, self.features):
            x = nn.leaky_relu(Conv(width, 3, dtype=self.dtype)(x), 0.1)
        factors = x
        for width in (self.features, channels, channels):
            x = nn.leaky_relu(Conv(width, 3, dtype=self.dtype)(x), 0.1)
        return factors, x


class Generator(nn.Module):
    """Restores a masked map: 3x3 convolution, ReLU, 3x3 convolution.

    For :func:`kdjax.losses.mgd`. A student with other channels than the teacher's is brought to them by a
    1x1 convolution before the mask, ``Conv(features, 1)``.

    Attributes:
      features: the teacher's channels.
      dtype: of the computation; parameters are float32.

    References:
      Yang et al., `Masked Generative Distillation <https://arxiv.org/abs/2205.01529>`_, 2022.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        """Generates a map of the teacher from a masked one of the student."""
        conv = functools.partial(Conv, self.features, 3, dtype=self.dtype)
        return conv()(nn.relu(conv()(x)))


class ReviewFusion(nn.Module):
    """Joins a map of the student with what deeper stages handed up, by attention, and reads it for the teacher.

    For :func:`kdjax.losses.reviewkd`: start at the deepest stage, without ``deeper``, and hand the second result up.
    A 1x1 convolution brings the map to ``hidden`` channels; ``deeper``, enlarged to its size, is mixed with it by two
    weights per position; a 3x3 convolution brings the mixture to the teacher's channels. Both are normalised.

    Attributes:
      features: the teacher's channels.
      hidden: channels of the mixture, equal for all stages.
      axis_name: of the mapped axis over which batch statistics are averaged; None keeps each device's own.
      dtype: of the computation; parameters and batch statistics are float32.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review <https://arxiv.org/abs/2104.09044>`_, 2021, section 3.3.
      Default there: as many hidden channels as the student's deepest map has, at most 512.
    """

    features: int
    hidden: int
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        deeper: Float[Array, "batch deeper_height deeper_width hidden"] | None = None,
        *,
        train: bool,
    ) -> tuple[Float[Array, "batch height width features"], Float[Array, "batch height width hidden"]]:
        """Returns the map to compare with the teacher's, and the mixture, which the next shallower stage takes.

        Args:
          x: a map of the student.
          deeper: the mixture of the stage below; None at the deepest stage, which has no attention.
          train: normalise by the batch and update "batch_stats".
        """
        norm = batch_norm(self, train=train)
        x = norm()(Conv(self.hidden, 1, use_bias=False, dtype=self.dtype, name="reduce")(x))
        if deeper is not None:
            enlarged = jax.image.resize(deeper, x.shape, method="nearest").astype(x.dtype)
            both = jnp.concatenate([x, enlarged], axis=-1)
            weights = nn.sigmoid(Conv(2, 1, dtype=self.dtype, name="attention")(both))
            x = x * weights[..., :1] + enlarged * weights[..., 1:]
        return norm()(Conv(self.features, 3, use_bias=False, dtype=self.dtype, name="expand")(x)), x
