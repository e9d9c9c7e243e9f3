"""Losses between feature maps: what the layers of two networks see, not only what they answer.

All of them take one pair of maps, student first, channels last, return one value per example and compute in float32.
A method that matches several layers is a sum that the caller writes, with the weights of the layers in sight::

    sum(jnp.mean(losses.attention_transfer(s, t)) for s, t in zip(student_maps, teacher_maps, strict=True))

The exception is :func:`fsp`, which is about the way from one layer to the next and takes two maps of each
network. Where a loss needs maps of equal shape, a learnable head (:mod:`kdjax.models.heads`) makes them so;
where it only needs equal heights and widths, the larger map is average-pooled to the smaller.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kdjax.losses._checks import Exponent, Fraction, NonNegative, Positive, checked
from kdjax.losses.maps import attention_map, map_distance
from kdjax.types import Scalar


@checked
def hint(
    student_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch"]:
    r"""Mean squared difference between a map of the student and the teacher's map that is its hint.

    Known as FitNets.

    .. math:: \frac{1}{HWC} \sum_{p, c} (s_{pc} - t_{pc})^2

    Args:
      student_features: usually the output of :class:`kdjax.models.heads.Regressor`, which brings a middle layer
        of the student to the teacher's channels.
      teacher_features: the hint; constant under differentiation.

    Returns:
      One non-negative value per example, zero where the maps are equal. Reduce with ``jnp.mean``.

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets <https://arxiv.org/abs/1412.6550>`_, 2015, section 2.2, there
      half the sum and the only loss of a first stage of training. As one term of a sum: weight 100 (Tian et al.,
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
    r"""Mean squared difference of where the two networks look: their energies over the image, of unit norm.

    Known as AT.

    .. math:: \frac{1}{P} \sum_p (Q^s_p - Q^t_p)^2, \quad
              Q_p = \frac{\sum_c |f_{pc}|^k}{\big\| \sum_c |f_{\cdot c}|^k \big\|_2}

    Channels may differ. So may heights and widths: the larger map is average-pooled to the smaller first.

    Args:
      student_features: a map of the student.
      teacher_features: the teacher's map of the same stage; constant under differentiation.
      power: exponent k ≥ 1 of the activations; the higher, the more the strongest channels count.

    Returns:
      One value per example between 0 and 2 / P, zero where the attention maps are equal. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the power is below 1.

    Cost:
      O(B·P·C) time, O(B·P·C) memory. Pooling to a size that does not divide the larger takes O(B·P²·C) time.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention <https://arxiv.org/abs/1612.03928>`_, 2017, section 3.1,
      in the form of the authors' code, whose mean stands where equation 2 has the norm. Default there: k 2, weight
      1000 on the sum over the last maps of the stages.
    """
    return map_distance(*_attention_maps(student_features, teacher_features, power))


@checked
def factor_transfer(
    student_factors: Float[Array, "*batch student_height student_width student_channels"],
    teacher_factors: Float[Array, "*batch teacher_height teacher_width teacher_channels"],
    *,
    power: Exponent = 2.0,
) -> Float[Array, "*batch"]:
    r"""Mean absolute difference of the energies of two factors over the image, of unit norm.

    Known as FT.

    .. math:: \frac{1}{P} \sum_p |Q^s_p - Q^t_p|

    with Q as in :func:`attention_transfer`. The paper normalises the whole factor; this is the form of the published
    comparisons, in which heights and widths may differ as well.

    Args:
      student_factors: the output of :class:`kdjax.models.heads.FactorTranslator`, trained with the student.
      teacher_factors: the output of :class:`kdjax.models.heads.FactorParaphraser`, trained on the teacher's maps
        beforehand to reconstruct them; constant under differentiation.
      power: exponent k ≥ 1 of the factors.

    Returns:
      One non-negative value per example, zero where the factors are equal. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the power is below 1.

    Cost:
      O(B·P·C) time, O(B·P·C) memory. Pooling to a size that does not divide the larger takes O(B·P²·C) time.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network: Network Compression via Factor Transfer
      <https://arxiv.org/abs/1802.04977>`_, 2018; in the form of Tian et al., `Contrastive Representation Distillation
      <https://arxiv.org/abs/1910.10699>`_, 2020 (weight 200). Weight in the authors' code for CIFAR-10, where the
      whole factor has unit norm: 500.
    """
    student, teacher = _attention_maps(student_factors, teacher_factors, power)
    return jnp.mean(jnp.abs(student - teacher), axis=-1)


@checked
def nst(
    student_features: Float[Array, "*batch student_height student_width student_channels"],
    teacher_features: Float[Array, "*batch teacher_height teacher_width teacher_channels"],
) -> Float[Array, "*batch"]:
    r"""Squared maximum mean discrepancy between the two sets of channels, each a pattern over the image.

    Known as NST.

    .. math:: \frac{1}{C_t^2} \sum_{ij} \langle t_i, t_j \rangle^2
              + \frac{1}{C_s^2} \sum_{ij} \langle s_i, s_j \rangle^2
              - \frac{2}{C_s C_t} \sum_{ij} \langle s_i, t_j \rangle^2

    of channels s_i, t_j scaled to unit norm over positions: the polynomial kernel of degree 2. The same number is
    :math:`\| S^\top S / C_s - T^\top T / C_t \|_F^2` with the channels as rows, so that either Gram matrices over
    channels or ones over positions do, whichever are smaller; no product of more than two axes is ever stored.

    Args:
      student_features: a map of the student, in any number of channels.
      teacher_features: a map of the teacher; constant under differentiation. Where heights or widths differ, the larger
        map is average-pooled to the smaller.

    Returns:
      One value per example, non-negative up to rounding, zero where the channels are equal in any order. Reduce with
      ``jnp.mean``.

    Cost:
      O(B·P·C·min(P, C)) time, O(B·P·C + B·min(P, C)²) memory, with the larger C. Pooling to a size that does
      not divide the larger takes O(B·P²·C) time.

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
    r"""Mean squared difference of the flow from one layer to a later one: the products of their channels.

    Known as FSP.

    .. math:: \frac{1}{C_1 C_2} \sum_{ij} (G^s_{ij} - G^t_{ij})^2, \quad G_{ij} = \frac{1}{P} \sum_p a_{pi} b_{pj}

    Student and teacher need equal channels. Where a network's two maps differ in height or width, the larger is
    average-pooled to the smaller.

    Args:
      student_features: two maps of the student, a and b, usually of the first and last layer of a stage, or of
        consecutive stages.
      teacher_features: the same two of the teacher; constant under differentiation.

    Returns:
      One non-negative value per example, zero where the flows are equal. Reduce with ``jnp.mean``.

    Cost:
      O(B·P·C²) time, O(B·P·C + B·C²) memory. Pooling to a size that does not divide the larger takes O(B·P²·C)
      time.

    References:
      Yim et al., `A Gift from Knowledge Distillation
      <https://openaccess.thecvf.com/content_cvpr_2017/html/Yim_A_Gift_From_CVPR_2017_paper.html>`_, 2017, section 3,
      there a first stage of training, with max-pooling. As one: weight 50 for the sum over consecutive stages (Tian et
      al., `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020).
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
    r"""Squared hinge on which neurons fire: the student's are to be on the teacher's side of zero, by a margin.

    Known as AB.

    .. math:: \sum_{p, c} \max(0, m + \epsilon_{pc} s_{pc})^2, \quad
              \epsilon_{pc} = -1 \text{ if } t_{pc} > 0 \text{ else } 1

    Args:
      student_features: activations *before* the ReLU, brought to the teacher's channels by
        :class:`kdjax.models.heads.Regressor` without its ReLU.
      teacher_features: the teacher's activations before its ReLU, of which only the sign counts.
      margin: distance m >= 0 from zero beyond which a student's neuron is left alone.

    Returns:
      One non-negative value per example, a sum over neurons. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the margin is below 0.

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Heo et al., `Knowledge Transfer via Distillation of Activation Boundaries <https://arxiv.org/abs/1811.03233>`_,
      2019. Default in the authors' code: m 1, a first stage of training with weight 3 / 1000 · 2^(i - n + 1) on layer
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
    r"""Squared difference before the ReLU, that does not ask for more than the teacher's ReLU lets through.

    Known as OFD.

    .. math:: \sum_{p, c} (s_{pc} - \hat t_{pc})^2 \, [s_{pc} > \hat t_{pc} \text{ or } \hat t_{pc} > 0], \quad
              \hat t_{pc} = \max(t_{pc}, m_c)

    Args:
      student_features: activations before the ReLU, brought to the teacher's channels by
        :class:`kdjax.models.heads.Regressor` without its ReLU.
      teacher_features: the teacher's activations before its ReLU; constant under differentiation. The teacher is in
        evaluation mode.
      margin: what each channel's negative values count as, at most 0: :func:`ofd_margin`.

    Returns:
      One non-negative value per example, a sum over neurons, zero at equality. Reduce with ``jnp.mean``.

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation <https://arxiv.org/abs/1904.01866>`_, 2019.
      Default in the authors' code: weight 1 / 1000 · 2^(i - n + 1) on layer i = 0, ..., n - 1 for CIFAR-100, a tenth of
      it for ImageNet.
    """
    student, teacher = _float(student_features), _constant(teacher_features)
    teacher = jnp.maximum(teacher, _per_channel(_constant(margin), teacher))
    return _sum(jnp.where((student > teacher) | (teacher > 0), jnp.square(student - teacher), 0))


@checked
def ofd_margin(
    scale: Float[Array, " channels"], bias: Float[Array, " channels"]
) -> Float[Array, " channels"]:
    r"""What a channel's negative values are on average, from the batch normalisation that it comes out of.

    Known as OFD.

    .. math:: m = \mathrm{E}[x \mid x < 0] = \beta - |\gamma| \, \frac{\phi(\beta / \gamma)}{\Phi(-\beta / |\gamma|)},
              \quad x \sim N(\beta, \gamma^2)

    Args:
      scale: the learnt scale γ of the teacher's last normalisation before the ReLU.
      bias: its learnt bias β.

    Returns:
      The ``margin`` of :func:`ofd`. As in the authors' code, a channel that is negative less than once in a
      thousand gets -3 \|γ\|.

    Cost:
      O(C) time, O(C) memory, once before training.

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
    *,
    levels: Sequence[int] = (4, 2, 1),
) -> Float[Array, "*batch"]:
    r"""Mean squared difference over a pyramid of ever coarser means (hierarchical context loss).

    Known as ReviewKD.

    .. math:: \frac{\sum_{l=0}^{L} 2^{-l} \, \mathrm{MSE}(\mathrm{pool}_l(s), \mathrm{pool}_l(t))}
              {\sum_{l=0}^{L} 2^{-l}}

    Level 0 is the map itself; the others are its means over a grid.

    Args:
      student_features: usually an output of :class:`kdjax.models.heads.ReviewFusion`.
      teacher_features: the teacher's map of that stage; constant under differentiation.
      levels: sides of the grids, coarsest last; those that are not smaller than the map are left out.

    Returns:
      One non-negative value per example, zero where the maps are equal. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if a level is below 1.

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review <https://arxiv.org/abs/2104.09044>`_, 2021, section 3.3.
      Default there: the sum over all stages, weight .6 to 8 by pair, with a warm-up over 20 epochs on CIFAR-100.
    """
    if any(level < 1 for level in levels):
        raise ValueError(f"reviewkd needs grids of at least 1, got levels={levels!r}; write (4, 2, 1).")
    difference = _float(student_features) - _constant(teacher_features)
    used = [level for level in levels if level < min(difference.shape[-3:-1])]
    pyramid = [difference, *(_pool(difference, (level, level)) for level in used)]
    weights = [0.5**level for level in range(len(pyramid))]
    terms = [weight * _mean(jnp.square(x)) for weight, x in zip(weights, pyramid, strict=True)]
    return functools.reduce(jnp.add, terms) / sum(weights)


@checked
def vid(
    student_mean: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
    *,
    log_scale: Float[Array, " channels"],
    smallest_variance: Positive = 1e-5,
) -> Float[Array, "*batch"]:
    r"""Negative log-likelihood of the teacher's map under a Gaussian that the student predicts, less its constant.

    Known as VID.

    .. math:: \frac{1}{HWC} \sum_{p, c} \frac12 \Big( \frac{(\mu_{pc} - t_{pc})^2}{\sigma_c^2} + \log \sigma_c^2 \Big),
              \quad \sigma_c^2 = \log(1 + e^{a_c}) + \epsilon

    Minimising it raises a lower bound on the mutual information of the two maps. The scales are learnt too: their
    gradient belongs in the optimizer with the head's.

    Args:
      student_mean: the mean μ, the first output of :class:`kdjax.models.heads.VidHead`.
      teacher_features: the teacher's map; constant under differentiation.
      log_scale: the learnt a, one per channel, the second output of the head; it receives a gradient.
      smallest_variance: ε > 0.

    Returns:
      One value per example, of either sign. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the smallest variance is not above 0.

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Ahn et al., `Variational Information Distillation <https://arxiv.org/abs/1904.05835>`_, 2019, equation 5.
      Default in Tian et al., `Contrastive Representation Distillation
      <https://arxiv.org/abs/1910.10699>`_, 2020: weight 1 for the sum over the middle maps.
    """
    variance = jax.nn.softplus(_float(log_scale)) + smallest_variance
    error = jnp.square(_float(student_mean) - _constant(teacher_features))
    return 0.5 * (_mean(error / _per_channel(variance, error)) + jnp.mean(jnp.log(variance)))


@checked
def mgd(
    generated_features: Float[Array, "*batch height width channels"],
    teacher_features: Float[Array, "*batch height width channels"],
) -> Float[Array, "*batch"]:
    r"""Squared difference between the teacher's map and what was generated from a masked map of the student.

    Known as MGD.

    .. math:: \sum_{p, c} (g_{pc} - t_{pc})^2

    ::

        aligned = features @ align  # to the teacher's channels, where they differ
        generated = generator.apply(variables, losses.mask_positions(key, aligned, fraction=0.5))
        loss = jnp.mean(losses.mgd(generated, teacher_features))

    Args:
      generated_features: output of :class:`kdjax.models.heads.Generator` on :func:`mask_positions` or
        :func:`mask_channels` of the student's map.
      teacher_features: the teacher's map, unmasked; constant under differentiation.

    Returns:
      One non-negative value per example, a sum over positions and channels. Reduce with ``jnp.mean``.

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Yang et al., `Masked Generative Distillation <https://arxiv.org/abs/2205.01529>`_, 2022. Default in the authors'
      code: weight 7e-5 (ImageNet, masked channels); 2e-5 (one-stage detection and segmentation) or 5e-7 (two-stage
      detection), with masked positions.
    """
    return _sum(jnp.square(_float(generated_features) - _constant(teacher_features)))


@checked
def mask_positions(
    key: Array, features: Float[Array, "*batch height width channels"], *, fraction: Fraction = 0.65
) -> Float[Array, "*batch height width channels"]:
    """Sets positions of a map to zero at random, all channels of one together.

    Args:
      key: randomness, ``jax.random.key(...)``; a new one every step.
      features: a map of the student.
      fraction: probability with which each position is masked.

    Returns:
      The map, of the same dtype; what remains is *not* scaled up.

    Raises:
      ValueError: if the fraction is outside [0, 1).

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

    References:
      Yang et al., `Masked Generative Distillation <https://arxiv.org/abs/2205.01529>`_, 2022. Default in the authors'
      code: .65 or .45 in detection (one- or two-stage), .75 in segmentation.
    """
    return _mask(key, features, (*features.shape[:-1], 1), fraction)


@checked
def mask_channels(
    key: Array, features: Float[Array, "*batch height width channels"], *, fraction: Fraction = 0.15
) -> Float[Array, "*batch height width channels"]:
    """Sets channels of a map to zero at random, all positions of one together.

    Args:
      key: randomness, ``jax.random.key(...)``; a new one every step.
      features: a map of the student.
      fraction: probability with which each channel is masked.

    Returns:
      The map, of the same dtype; what remains is *not* scaled up.

    Raises:
      ValueError: if the fraction is outside [0, 1).

    Cost:
      O(B·P·C) time, O(B·P·C) memory.

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
    """Two maps at the smaller height and the smaller width of both."""
    height, width = (min(sizes) for sizes in zip(a.shape[-3:-1], b.shape[-3:-1], strict=True))
    return _pool(a, (height, width)), _pool(b, (height, width))


def _pool(x: Array, size: tuple[int, int]) -> Array:
    """Means over a grid of cells, which overlap where a side of the map is no multiple of the grid's."""
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
    """The weights with which each of ``new`` cells takes the mean of its part of a side."""
    cell, place = np.arange(new)[:, None], np.arange(old)
    inside = (place >= cell * old // new) & (place < -(-(cell + 1) * old // new))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def _attention_maps(student: Array, teacher: Array, power: Scalar) -> tuple[Array, Array]:
    student, teacher = _same_size(_float(student), _constant(teacher))
    return attention_map(student, power=power), attention_map(teacher, power=power)


def _unit_channels(x: Float[Array, "*batch positions channels"]) -> Float[Array, "*batch positions channels"]:
    """Channels scaled to unit norm over positions; one that is zero everywhere stays so and gets no gradient."""
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
