"""Heads: small networks that some losses need during training only.

Their parameters are trained with the student's, in one pytree::

    head = heads.VidHead(features=teacher_channels)
    params = {"student": student_params, "head": head.init(key, student_map)["params"]}

    def objective(params, ...):
        mean, log_scale = head.apply({"params": params["head"]}, outputs.features["stage2"])
        loss = losses.vid(mean, teacher_map, log_scale=log_scale)

Heads with batch normalisation also keep "batch_stats". A layer before a normalisation has no bias, which would be
subtracted again and receive no gradient. Initialise heads with ``module.init``; the losses are in :mod:`kdjax.losses`.
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
    """Maps the student's channels to the teacher's: 1x1 convolution, batch normalisation, ReLU.

    For :func:`kdjax.losses.hint`. Losses on activations before the ReLU (:func:`kdjax.losses.ofd`,
    :func:`kdjax.losses.activation_boundary`) use it without the ReLU: ``activation=lambda x: x``.

    Attributes:
      features: the teacher's channels.
      activation: the last operation.
      axis_name: mapped axis over which batch statistics are averaged; None keeps them per device.
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
        """Returns the mapped features; training normalises by the batch and updates "batch_stats"."""
        x = Conv(self.features, 1, use_bias=False, dtype=self.dtype)(x)
        return self.activation(batch_norm(self, train=train)()(x))


class Embedding(nn.Module):
    """Projects features onto the unit sphere: flatten, one linear layer, division by the 2-norm.

    For :func:`kdjax.losses.crd` and :func:`kdjax.losses.info_nce`: one head for the student and one for the teacher,
    both trained. A row that the layer maps to zero stays zero and receives no gradient.

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


class OrthogonalProjection(nn.Module):
    """Projects an embedding linearly by a matrix whose shorter side is orthonormal.

    For :func:`kdjax.losses.vkd`. To more features than it is given, it keeps all distances between examples; to fewer,
    it keeps those within a subspace. The trained parameter is any matrix of full rank, and the matrix is the
    orthonormal factor of its QR decomposition.

    Attributes:
      features: the teacher's width.

    References:
      Miles, Elezi, Deng, `VkD <https://arxiv.org/abs/2403.06213>`_, 2024, section 3.1, there by a matrix exponential.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch features"]:
        """Returns the projected embedding, float32."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.orthogonal(), shape, jnp.float32)
        wider = shape[1] > shape[0]
        basis, upper = jnp.linalg.qr(kernel.T if wider else kernel)
        # So that an orthonormal parameter is the matrix itself.
        basis = basis * jnp.where(jnp.diagonal(upper) < 0, -1, 1)[None]
        return x.astype(jnp.float32) @ (basis.T if wider else basis)


class VidHead(nn.Module):
    """Predicts the teacher's map: its mean from the student's by three 1x1 convolutions, its variance per channel.

    For :func:`kdjax.losses.vid`. The convolutions have ReLUs between them and no bias. The variance is a parameter that
    does not depend on the input; it starts at 5.

    Attributes:
      features: the teacher's channels.
      dtype: of the convolutions; parameters are float32.

    References:
      Ahn et al., `Variational Information Distillation <https://arxiv.org/abs/1904.05835>`_, 2019, in the form of Tian
      et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020: an initial
      variance of 5, as many hidden channels as the teacher's map has.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Float[Array, "batch height width features"], Float[Array, " features"]]:
        """Returns the mean and the ``log_scale`` of the teacher's map."""
        conv = functools.partial(Conv, self.features, 1, use_bias=False, dtype=self.dtype)
        mean = conv()(nn.relu(conv()(nn.relu(conv()(x)))))
        start = math.log(math.expm1(5.0 - 1e-5))  # where the variance softplus(log_scale) + 1e-5 is 5
        return mean, self.param("log_scale", nn.initializers.constant(start), (self.features,), jnp.float32)


class FactorTranslator(nn.Module):
    """Turns a map of the student into factors: three 3x3 convolutions with batch normalisation and leaky ReLU.

    For :func:`kdjax.losses.factor_transfer`, trained with the student.

    Attributes:
      features: channels of the factors, those of the teacher's :class:`FactorParaphraser`.
      axis_name: mapped axis over which batch statistics are averaged; None keeps them per device.
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
        """Returns the factors; training normalises by the batch and updates "batch_stats"."""
        for channels in (x.shape[-1], self.features, self.features):
            x = Conv(channels, 3, use_bias=False, dtype=self.dtype)(x)
            x = nn.leaky_relu(batch_norm(self, train=train)()(x), 0.1)
        return x


class FactorParaphraser(nn.Module):
    """Autoencoder of a map of the teacher; its bottleneck holds the factors.

    For :func:`kdjax.losses.factor_transfer`. Train it first, on the teacher alone, with
    ``losses.hint(reconstruction, teacher_map)``, then freeze it. Encoder and decoder have three 3x3 convolutions each,
    with leaky ReLUs. The original's transposed convolutions of stride 1 are plain convolutions with flipped kernels.

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
    """Restores the teacher's map from a masked map of the student: 3x3 convolution, ReLU, 3x3 convolution.

    For :func:`kdjax.losses.mgd`. The caller masks channels or positions, with :func:`kdjax.losses.mask_channels` or
    :func:`kdjax.losses.mask_positions`. Where the student's channels differ from the teacher's, map them with a 1x1
    convolution before the mask: ``Conv(features, 1)``.

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
        """Returns the restored map."""
        conv = functools.partial(Conv, self.features, 3, dtype=self.dtype)
        return conv()(nn.relu(conv()(x)))


class ReviewFusion(nn.Module):
    """Fuses a map of the student with the fused map of the next deeper stage, by attention.

    For :func:`kdjax.losses.reviewkd`. Start at the deepest stage, without ``deeper``, and pass the second result to the
    next shallower stage. A 1x1 convolution maps ``x`` to ``hidden`` channels; ``deeper`` is resized to the same height
    and width; the two are added with two learnt weights per position; a 3x3 convolution maps the sum to the teacher's
    channels. Both convolutions are followed by batch normalisation.

    Attributes:
      features: the teacher's channels.
      hidden: channels of the fused map, equal for all stages.
      axis_name: mapped axis over which batch statistics are averaged; None keeps them per device.
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
        """Returns the map to compare with the teacher's, and the fused map for the next shallower stage.

        Args:
          x: a map of the student.
          deeper: the fused map of the next deeper stage; None at the deepest stage, which has no attention.
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
