"""Losses between feature maps of two networks.

All take one map of the student and one of the teacher, channels last, compute in float32 and return one value per
example. A method that matches several layers is a sum that the caller writes::

    sum(jnp.mean(losses.attention_transfer(s, t)) for s, t in zip(student_maps, teacher_maps, strict=True))

Only :func:`fsp` takes two maps of each network. Where a loss needs maps of equal shape, a learnable head
(:mod:`kdjax.models.heads`) converts the student's; where it needs equal heights and widths only, the larger map is
average-pooled to the smaller.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from kdjax.losses._checks import Exponent, Fraction, NonNegative, checked
from kdjax.losses.maps import attention_map, map_distance
from kdjax.types import Scalar


@checked
def hint(
    student_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch"]:
    r"""FitNets (hint learning): mean squared difference between a map of the student and one of the teacher.

    .. math:: \frac{1}{HWC} \sum_{p, c} (s_{pc} - t_{pc})^2

    Args:
      student_features: usually the output of :class:`kdjax.models.heads.Regressor`, which maps a middle layer of the
        student to the teacher's channels.
      teacher_features: the hint; constant under differentiation.

    Returns:
      One non-negative value per example, zero where the maps are equal. Reduce with ``jnp.mean``.

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_, 2015, section 2.2:
      half the sum there, as the only loss of a first training stage. Weight 100 as a term of a sum (Tian et al.,
      `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020, appendix).
    """
    return _mean(jnp.square(_float(student_features) - _constant(teacher_features)))


@checked
def attention_transfer(
    student_features: Float[Array, "*batch student_height student_width student_channels"],
    teacher_features: Float[Array, "*batch teacher_height teacher_width teacher_channels"],
    *,
    power: Exponent = 2.0,
) -> Float[Array, "*batch"]:
    r"""Attention transfer (AT): mean squared difference of two attention maps of unit norm.

    .. math:: \frac{1}{P} \sum_p (Q^s_p - Q^t_p)^2, \quad
              Q_p = \frac{\sum_c |f_{pc}|^k}{\big\| \sum_c |f_{\cdot c}|^k \big\|_2}

    Channels may differ. So may heights and widths: the larger map is average-pooled to the smaller first.

    Args:
      student_features: a map of the student.
      teacher_features: the teacher's map of the same stage; constant under differentiation.
      power: exponent k ≥ 1; larger values give more weight to the strongest activations.

    Returns:
      One value per example between 0 and 2 / P, zero where the attention maps are equal. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the power is below 1.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017, section 3.1;
      the mean replaces the norm of equation 2, as in the authors' code. Default there: k 2, weight 1000 on the sum over
      the last maps of the stages.
    """
    return map_distance(*_attention_maps(student_features, teacher_features, power))


@checked
def factor_transfer(
    student_factors: Float[Array, "*batch student_height student_width student_channels"],
    teacher_factors: Float[Array, "*batch teacher_height teacher_width teacher_channels"],
) -> Float[Array, "*batch"]:
    r"""Factor transfer (FT): mean absolute difference of the attention maps of two factors, of unit norm.

    .. math:: \frac{1}{P} \sum_p |Q^s_p - Q^t_p|

    with Q as in :func:`attention_transfer` for k = 2. The paper normalises the whole factor; this is the form of
    RepDistiller, which also allows different heights and widths.

    Args:
      student_factors: the output of :class:`kdjax.models.heads.FactorTranslator`, trained with the student.
      teacher_factors: the output of :class:`kdjax.models.heads.FactorParaphraser`, trained beforehand to reconstruct
        the teacher's maps; constant under differentiation.

    Returns:
      One non-negative value per example, zero where the factors are equal. Reduce with ``jnp.mean``.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network: Network Compression via Factor Transfer
      <https://arxiv.org/abs/1802.04977>`_, 2018; in the form of Tian et al., `Contrastive Representation Distillation
      <https://arxiv.org/abs/1910.10699>`_, 2020, RepDistiller (weight 200). Weight in the authors' code for CIFAR-10,
      where the whole factor has unit norm: 500.
    """
    student, teacher = _attention_maps(student_factors, teacher_factors, 2.0)
    return jnp.mean(jnp.abs(student - teacher), axis=-1)


@checked
def nst(
    student_features: Float[Array, "*batch student_height student_width student_channels"],
    teacher_features: Float[Array, "*batch teacher_height teacher_width teacher_channels"],
) -> Float[Array, "*batch"]:
    r"""Neuron selectivity transfer (NST): squared maximum mean discrepancy between two sets of channels.

    .. math:: \frac{1}{C_t^2} \sum_{ij} \langle t_i, t_j \rangle^2
              + \frac{1}{C_s^2} \sum_{ij} \langle s_i, s_j \rangle^2
              - \frac{2}{C_s C_t} \sum_{ij} \langle s_i, t_j \rangle^2

    with channels s_i, t_j of unit norm over positions: the polynomial kernel of degree 2. With the channels as rows it
    equals :math:`\| S^\top S / C_s - T^\top T / C_t \|_F^2`; of the Gram matrices over channels and over positions the
    smaller are computed.

    Args:
      student_features: a map of the student, in any number of channels.
      teacher_features: a map of the teacher; constant under differentiation. Where heights or widths differ, the larger
        map is average-pooled to the smaller.

    Returns:
      One value per example, non-negative up to rounding, zero where the channels are equal in any order. Reduce with
      ``jnp.mean``.

    References:
      Huang, Wang, `Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
      <https://arxiv.org/abs/1707.01219>`_, 2017, section 4.2, polynomial kernel. Weight 50 in Tian et al.,
      `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020, for the sum over stages.
    """
    student, teacher = (
        _unit_channels(_flat(x)) for x in _same_size(_float(student_features), _constant(teacher_features))
    )
    if student.shape[-2] <= max(student.shape[-1], teacher.shape[-1]):
        student, teacher = (_gram(x, x, axis=-1) / x.shape[-1] for x in (student, teacher))
        return jnp.sum(jnp.square(student - teacher), axis=(-2, -1))
    return _kernel(teacher, teacher) + _kernel(student, student) - 2 * _kernel(student, teacher)


@checked
def fsp(
    student_features: tuple[
        Float[Array, "*batch height_a width_a first"], Float[Array, "*batch height_b width_b second"]
    ],
    teacher_features: tuple[
        Float[Array, "*batch height_c width_c first"], Float[Array, "*batch height_d width_d second"]
    ],
) -> Float[Array, "*batch"]:
    r"""Flow of the solution procedure (FSP): mean squared difference of the Gram matrices between two layers.

    .. math:: \frac{1}{C_1 C_2} \sum_{ij} (G^s_{ij} - G^t_{ij})^2, \quad G_{ij} = \frac{1}{P} \sum_p a_{pi} b_{pj}

    Student and teacher need equal channels. Where a network's two maps differ in height or width, the larger is
    average-pooled to the smaller.

    Args:
      student_features: two maps of the student, a and b, usually of the first and last layer of a stage, or of
        consecutive stages.
      teacher_features: the same two maps of the teacher; constant under differentiation.

    Returns:
      One non-negative value per example, zero where the Gram matrices are equal. Reduce with ``jnp.mean``.

    References:
      Yim et al., `A Gift from Knowledge Distillation
      <https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html>`_, 2017, section 3:
      the loss of a first training stage, with max-pooling. Weight 50 for the sum over consecutive stages (Tian et al.,
      `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020).
    """
    student = _flow(*(_float(x) for x in student_features))
    teacher = _flow(*(_constant(x) for x in teacher_features))
    return jnp.mean(jnp.square(student - teacher), axis=(-2, -1))


@checked
def activation_boundary(
    student_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
    *,
    margin: NonNegative = 1.0,
) -> Float[Array, "*batch"]:
    r"""Activation boundaries (AB): squared hinge loss on the sign of the teacher's activations before the ReLU.

    .. math:: \sum_{p, c} \max(0, m + \epsilon_{pc} s_{pc})^2, \quad
              \epsilon_{pc} = -1 \text{ if } t_{pc} > 0 \text{ else } 1

    Args:
      student_features: activations *before* the ReLU, mapped to the teacher's channels by
        :class:`kdjax.models.heads.Regressor` without its ReLU.
      teacher_features: the teacher's activations before its ReLU; only the sign counts.
      margin: m ≥ 0; a student's activation of the right sign and at least m from zero costs nothing.

    Returns:
      One non-negative value per example, a sum over neurons. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the margin is below 0.

    References:
      Heo et al., `Knowledge Transfer via Distillation of Activation Boundaries <https://arxiv.org/abs/1811.03233>`_,
      2019. Default in the authors' code: m 1, a first training stage with weight 3 / 1000 · 2^(i - n + 1) on layer
      i = 0, ..., n - 1.
    """
    student = _float(student_features)
    away = jnp.where(_constant(teacher_features) > 0, -student, student)
    return _sum(jnp.square(jax.nn.relu(margin + away)))


@checked
def ofd(
    student_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
    *,
    margin: Float[Array, " channels"],
) -> Float[Array, "*batch"]:
    r"""Overhaul of feature distillation (OFD): partial squared difference of activations before the ReLU.

    .. math:: \sum_{p, c} (s_{pc} - \hat t_{pc})^2 \, [s_{pc} > \hat t_{pc} \text{ or } \hat t_{pc} > 0], \quad
              \hat t_{pc} = \max(t_{pc}, m_c)

    Args:
      student_features: activations before the ReLU, mapped to the teacher's channels by
        :class:`kdjax.models.heads.Regressor` without its ReLU.
      teacher_features: the teacher's activations before its ReLU, in evaluation mode; constant under differentiation.
      margin: m ≤ 0, the target of each channel where the teacher's value is below it; see :func:`ofd_margin`.

    Returns:
      One non-negative value per example, a sum over neurons, zero at equality. Reduce with ``jnp.mean``.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation <https://arxiv.org/abs/1904.01866>`_, 2019.
      Default in the authors' code: weight 1 / 1000 · 2^(i - n + 1) on layer i = 0, ..., n - 1 for CIFAR-100, a
      tenth of it for ImageNet.
    """
    student, teacher = _float(student_features), _constant(teacher_features)
    teacher = jnp.maximum(teacher, _per_channel(_constant(margin), teacher))
    return _sum(jnp.where((student > teacher) | (teacher > 0), jnp.square(student - teacher), 0))


@checked
def ofd_margin(
    scale: Float[Array, " channels"], bias: Float[Array, " channels"]
) -> Float[Array, " channels"]:
    r"""Margin of :func:`ofd`: the mean negative value of each channel, from the batch normalisation before it.

    .. math:: m = \mathrm{E}[x \mid x < 0] = \beta - |\gamma| \, \frac{\phi(\beta / \gamma)}{\Phi(-\beta / |\gamma|)},
              \quad x \sim N(\beta, \gamma^2)

    Args:
      scale: the learnt scale γ of the teacher's last normalisation before the ReLU.
      bias: its learnt bias β.

    Returns:
      The ``margin`` of :func:`ofd`. As in the authors' code, a channel that is negative with a probability below .001
      gets -3 \|γ\|.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation <https://arxiv.org/abs/1904.01866>`_, 2019.
    """
    bias, spread = _float(bias), jnp.maximum(jnp.abs(_float(scale)), 1e-12)
    mean = jnp.clip(bias / spread, -1e6, 1e6)
    log_rate = jax.scipy.stats.norm.logcdf(-mean)
    often = log_rate > math.log(1e-3)
    ratio = jnp.exp(jax.scipy.stats.norm.logpdf(mean) - jnp.where(often, log_rate, 0))
    return jnp.where(often, jnp.minimum(bias - spread * ratio, 0), -3 * spread)


@checked
def reviewkd(
    student_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch"]:
    r"""Knowledge review (ReviewKD): the hierarchical context loss, over a pyramid of average-pooled maps.

    .. math:: \frac{\sum_{l=0}^{L} 2^{-l} \, \mathrm{MSE}(\mathrm{pool}_l(s), \mathrm{pool}_l(t))}
              {\sum_{l=0}^{L} 2^{-l}}

    Level 0 is the map itself. The others are the map pooled to 4×4, 2×2 and 1×1; grids that are not smaller than the
    map are left out.

    Args:
      student_features: usually an output of :class:`kdjax.models.heads.ReviewFusion`.
      teacher_features: the teacher's map of that stage; constant under differentiation.

    Returns:
      One non-negative value per example, zero where the maps are equal. Reduce with ``jnp.mean``.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review <https://arxiv.org/abs/2104.09044>`_, 2021, section 3.3.
      Default there: the sum over all stages, weight .6 to 8 by pair, with a warm-up of 20 epochs on CIFAR-100.
    """
    difference = _float(student_features) - _constant(teacher_features)
    sides = [side for side in (4, 2, 1) if side < min(difference.shape[-3:-1])]
    pyramid = [difference, *(_pool(difference, (side, side)) for side in sides)]
    weights = [0.5**level for level in range(len(pyramid))]
    terms = [weight * _mean(jnp.square(x)) for weight, x in zip(weights, pyramid, strict=True)]
    return functools.reduce(jnp.add, terms) / sum(weights)


@checked
def vid(
    student_mean: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
    *,
    log_scale: Float[Array, " channels"],
) -> Float[Array, "*batch"]:
    r"""Variational information distillation (VID): Gaussian negative log-likelihood of the teacher's map.

    .. math:: \frac{1}{HWC} \sum_{p, c} \frac12 \Big( \frac{(\mu_{pc} - t_{pc})^2}{\sigma_c^2} + \log \sigma_c^2 \Big),
              \quad \sigma_c^2 = \log(1 + e^{a_c}) + 10^{-5}

    Minimising it raises a lower bound on the mutual information of the two maps. The constant of the Gaussian is left
    out.

    Args:
      student_mean: the mean μ, the first output of :class:`kdjax.models.heads.VidHead`.
      teacher_features: the teacher's map; constant under differentiation.
      log_scale: a, one per channel, the second output of the head; it is trained with the head.

    Returns:
      One value per example, of either sign. Reduce with ``jnp.mean``.

    References:
      Ahn et al., `Variational Information Distillation <https://arxiv.org/abs/1904.05835>`_, 2019, equation 5.
      Default in Tian et al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020:
      weight 1 for the sum over the middle maps.
    """
    variance = jax.nn.softplus(_float(log_scale)) + 1e-5
    error = jnp.square(_float(student_mean) - _constant(teacher_features))
    return 0.5 * (_mean(error / _per_channel(variance, error)) + jnp.mean(jnp.log(variance)))


@checked
def mgd(
    generated_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch"]:
    r"""Masked generative distillation (MGD): squared error of the teacher's map restored from a masked student's map.

    .. math:: \sum_{p, c} (g_{pc} - t_{pc})^2

    ::

        aligned = features @ align  # to the teacher's channels, where they differ
        generated = generator.apply(variables, losses.mask_channels(key, aligned, fraction=0.15))
        loss = jnp.mean(losses.mgd(generated, teacher_features))

    Args:
      generated_features: output of :class:`kdjax.models.heads.Generator` for the student's map, masked by
        :func:`mask_channels` (classification) or :func:`mask_positions` (detection, segmentation).
      teacher_features: the teacher's map, unmasked; constant under differentiation.

    Returns:
      One non-negative value per example, a sum over positions and channels. Reduce with ``jnp.mean``.

    References:
      Yang et al., `Masked Generative Distillation <https://arxiv.org/abs/2205.01529>`_, 2022, section 3. Default in
      the authors' code: weight 7e-5 with masked channels (ImageNet); with masked positions 2e-5 (one-stage detection
      and segmentation) or 5e-7 (two-stage detection).
    """
    return _sum(jnp.square(_float(generated_features) - _constant(teacher_features)))


@checked
def mask_positions(
    key: Array, features: Float[Array, "*batch height width channels"], *, fraction: Fraction = 0.65
) -> Float[Array, "*batch height width channels"]:
    """Sets random positions of a map to zero, in all channels: the mask of :func:`mgd` for dense tasks.

    Args:
      key: randomness, ``jax.random.key(...)``; a new one every step.
      features: a map of the student.
      fraction: probability with which each position is masked.

    Returns:
      The map, of the same dtype; what remains is *not* scaled up.

    Raises:
      ValueError: if the fraction is outside [0, 1).

    References:
      Yang et al., `Masked Generative Distillation <https://arxiv.org/abs/2205.01529>`_, 2022. Default in the authors'
      code: .65 or .45 in detection (one- or two-stage), .75 in segmentation.
    """
    return _mask(key, features, (*features.shape[:-1], 1), fraction)


@checked
def vkd(
    student_embedding: Float[Array, "*batch width"], teacher_embedding: Float[Array, "*batch width"]
) -> Float[Array, "*batch"]:
    r"""VkD: smooth L1 distance of a projected embedding from the teacher's, normalised to mean 0 and variance 1.

    .. math:: \frac1D \sum_d h\left(s_d - \frac{t_d - \mu(t)}{\sqrt{\sigma^2(t) + 10^{-5}}}\right), \quad
              h(x) = \begin{cases} x^2 / 2 & |x| < 1 \\ |x| - 1/2 & \text{else} \end{cases}

    Args:
      student_embedding: of the student's pooled features, by :class:`kdjax.models.heads.OrthogonalProjection`, which
        keeps distances between examples, so that the student and not the projection has to learn.
      teacher_embedding: pooled features of the teacher; constant under differentiation.

    Returns:
      One non-negative value per example. Reduce with ``jnp.mean``.

    References:
      Miles, Elezi, Deng, `VkD: Improving Knowledge Distillation using Orthogonal Projections
      <https://arxiv.org/abs/2403.06213>`_, 2024, as in the authors' code for image classification. Weight there: 1.
    """
    teacher = _constant(teacher_embedding)
    teacher -= jnp.mean(teacher, axis=-1, keepdims=True)
    teacher *= jax.lax.rsqrt(jnp.mean(jnp.square(teacher), axis=-1, keepdims=True) + 1e-5)
    return jnp.mean(optax.losses.huber_loss(_float(student_embedding), teacher), axis=-1)


@checked
def mask_channels(
    key: Array, features: Float[Array, "*batch height width channels"], *, fraction: Fraction = 0.15
) -> Float[Array, "*batch height width channels"]:
    """Sets random channels of a map to zero, at all positions: the mask of :func:`mgd` for classification.

    Args:
      key: randomness, ``jax.random.key(...)``; a new one every step.
      features: a map of the student.
      fraction: probability with which each channel is masked.

    Returns:
      The map, of the same dtype; what remains is *not* scaled up.

    Raises:
      ValueError: if the fraction is outside [0, 1).

    References:
      Yang et al., `Masked Generative Distillation <https://arxiv.org/abs/2205.01529>`_, 2022. Default in the authors'
      code: .15, on the last map of a classifier.
    """
    return _mask(key, features, (*features.shape[:-3], 1, 1, features.shape[-1]), fraction)


def _float(x: Array) -> Array:
    return x.astype(jnp.float32)


def _constant(x: Array) -> Array:
    return jax.lax.stop_gradient(x).astype(jnp.float32)


def _sum(x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch"]:
    return jnp.sum(x, axis=(-3, -2, -1))


def _mean(x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch"]:
    return jnp.mean(x, axis=(-3, -2, -1))


def _flat(x: Float[Array, "*batch height width channels"]) -> Float[Array, "*batch positions channels"]:
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _per_channel(values: Float[Array, " channels"], like: Array) -> Array:
    return values.reshape((1,) * (like.ndim - 1) + (-1,))


def _same_size(a: Array, b: Array) -> tuple[Array, Array]:
    """Average-pools two maps to the smaller height and the smaller width of both."""
    height, width = (min(sizes) for sizes in zip(a.shape[-3:-1], b.shape[-3:-1], strict=True))
    return _pool(a, (height, width)), _pool(b, (height, width))


def _pool(x: Array, size: tuple[int, int]) -> Array:
    """Average-pools to a grid of cells, which overlap where the sides of the map are not multiples of the grid's."""
    old, new = (*x.shape[-3:-1],), (*size,)
    if old == new:
        return x
    if old[0] % new[0] == 0 and old[1] % new[1] == 0:
        cells = x.reshape(*x.shape[:-3], new[0], old[0] // new[0], new[1], old[1] // new[1], x.shape[-1])
        return jnp.mean(cells, axis=(-4, -2))
    weights = jnp.asarray(np.kron(*(_cells(*sides) for sides in zip(old, new, strict=True))))
    pooled = jnp.einsum("qp,...pc->...qc", weights, _flat(x), precision="highest")
    return pooled.reshape(*x.shape[:-3], *new, x.shape[-1])


def _cells(old: int, new: int) -> np.ndarray:
    """Pooling weights along one axis, one row per cell."""
    cell, place = np.arange(new)[:, None], np.arange(old)
    inside = (place >= cell * old // new) & (place < -(-(cell + 1) * old // new))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _attention_maps(student: Array, teacher: Array, power: Scalar) -> tuple[Array, Array]:
    student, teacher = _same_size(_float(student), _constant(teacher))
    return attention_map(student, power=power), attention_map(teacher, power=power)


def _unit_channels(x: Float[Array, "*batch positions channels"]) -> Float[Array, "*batch positions channels"]:
    """Channels scaled to unit norm over positions; one that is zero everywhere stays zero and gets no gradient."""
    energy = jnp.sum(jnp.square(x), axis=-2, keepdims=True)
    dead = energy <= 1e-24
    return jnp.where(dead, 0, x * jax.lax.rsqrt(jnp.where(dead, 1, energy)))


def _gram(a: Array, b: Array, *, axis: int) -> Array:
    """Products of two matrices per example, summed over one of their axes."""
    return jnp.einsum("...pi,...qi->...pq" if axis == -1 else "...pi,...pj->...ij", a, b, precision="highest")


def _kernel(
    a: Float[Array, "*batch positions first"], b: Float[Array, "*batch positions second"]
) -> Float[Array, "*batch"]:
    """Mean of ⟨a_i, b_j⟩² over the pairs of channels."""
    return jnp.mean(jnp.square(_gram(a, b, axis=-2)), axis=(-2, -1))


def _flow(first: Array, second: Array) -> Float[Array, "*batch first second"]:
    first, second = (_flat(x) for x in _same_size(first, second))
    return _gram(first, second, axis=-2) / first.shape[-2]


def _mask(key: Array, features: Array, shape: tuple[int, ...], fraction: Scalar) -> Array:
    kept = jax.random.uniform(key, shape) >= fraction
    return jnp.where(kept, features, jnp.zeros((), features.dtype))
