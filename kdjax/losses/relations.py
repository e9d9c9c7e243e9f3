r"""Relational losses: distances, angles and similarities between the examples of a batch.

The two networks may differ in width, since the compared matrices have one row and column per example. All losses
compute in float32, with matrix products in full float32 precision, because differences of inner products cancel.
Undefined relations (of a zero vector, between equal rows, in a batch of one) have value and gradient zero.

**Sharded batches.** These losses are not means over examples. With the batch sharded over n devices, the mean of the
devices' losses covers only the pairs within a shard, one in n of all (of triples one in n²), and normalises by the
shard's own statistics: a different loss, usually a noisier one. With ``axis_name`` every function gathers the batch
over that mapped axis first and returns the value of the whole batch on every device. The mean over devices of its
gradients, or of its Hessian-vector products, is that of the whole batch. (Under ``shard_map`` this needs
``check_vma=False``, as in :mod:`kdjax.parallel`.) Every device computes the loss of the whole batch, which costs little
beside the network.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses._checks import Positive, Share, Temperature, checked
from kdjax.losses.logits import _live_pair, _normalise
from kdjax.types import Scalar

_ANGLES_AT_ONCE = 2**20  # elements per array in rkd_angle: 4 MiB, which fits a cache
_DENSE_BELOW = 32  # rows of the memory per candidate up to which crd computes all inner products


@checked
def rkd_distance(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Relational knowledge distillation of distances (RKD-D) between pairs of examples.

    .. math:: \frac{1}{B^2} \sum_{ij} h\!\left(\frac{\|s_i - s_j\|}{\mu_s} - \frac{\|t_i - t_j\|}{\mu_t}\right), \qquad
              h(x) = \begin{cases} x^2/2 & |x| \le 1 \\ |x| - 1/2 & \text{otherwise} \end{cases}

    with :math:`\mu` the mean distance over all pairs. Invariant to the scale of either network's features.

    Args:
      student: embeddings, usually pooled features before the classifier.
      teacher: the same of the teacher, of any width; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, a device compares only its own B²/n² pairs and
        normalises by their mean distance.

    Returns:
      One non-negative value for the batch; zero where distances are proportional. Rows closer than a thousandth of
      their distance from the batch mean count as equal, the resolution of float32 inner products.

    References:
      Park et al., `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_, 2019, section 3.2.1, as in
      the authors' code. Default weight there: 25 on CIFAR-100 with 50 for :func:`rkd_angle`.
    """
    distances = []
    for rows in _batches(student, teacher, axis_name):
        distance, _ = _distances(_centred_gram(rows))
        mean = jnp.sum(distance) / max(len(rows) * (len(rows) - 1), 1)
        distances.append(distance / jnp.where(mean == 0, 1, mean))
    return jnp.mean(optax.losses.huber_loss(*distances))


@checked
def rkd_angle(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Relational knowledge distillation of angles (RKD-A) in triples of examples.

    .. math:: \frac{1}{B^3} \sum_{ijk} h(\cos\angle s_j s_i s_k - \cos\angle t_j t_i t_k)

    with h as in :func:`rkd_distance`. The cosines come from the Gram matrix,
    :math:`\langle s_j - s_i, s_k - s_i\rangle = G_{jk} - G_{ij} - G_{ik} + G_{ii}`, for a few anchors i at a time, so
    neither the B²·D differences nor all B³ angles are stored.

    Args:
      student: embeddings, usually pooled features before the classifier.
      teacher: the same of the teacher, of any width; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, a device compares only its own B³/n³ triples.

    Returns:
      One non-negative value for the batch; zero where angles agree. Angles at equal rows (see :func:`rkd_distance`)
      have cosine 0.

    References:
      Park et al., `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_, 2019, section 3.2.2, as in
      the authors' code. Default weight there: 50 on CIFAR-100 with 25 for :func:`rkd_distance`.
    """
    student_rows, teacher_rows = _batches(student, teacher, axis_name)
    s_gram, t_gram = _centred_gram(student_rows), _centred_gram(teacher_rows)
    s_inverse, t_inverse = _distances(s_gram)[1], _distances(t_gram)[1]

    def at_anchor(anchor):
        s_row, s_scale, t_row, t_scale, i = anchor
        s_cosines = _cosines(s_gram, s_row, s_row[i], s_scale)
        return jnp.sum(optax.losses.huber_loss(s_cosines, _cosines(t_gram, t_row, t_row[i], t_scale)))

    batch = len(s_gram)
    anchors = (s_gram, s_inverse, t_gram, t_inverse, jnp.arange(batch))
    at_once = max(_ANGLES_AT_ONCE // batch**2, 1)
    if at_once >= batch:
        sums = jax.vmap(at_anchor)(anchors)
    else:
        sums = jax.lax.map(jax.checkpoint(at_anchor), anchors, batch_size=at_once)
    return jnp.sum(sums) / batch**3


@checked
def pkt(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Probabilistic knowledge transfer (PKT): KL divergence between distributions of similarity over the batch.

    .. math:: \frac{1}{B^2} \sum_{ij} q_{ij} \log\frac{q_{ij} + \epsilon}{p_{ij} + \epsilon}, \qquad
              p_{ij} = \frac{\cos(s_i, s_j) + 1}{\sum_k (\cos(s_i, s_k) + 1)}

    with q the same of the teacher and ε = 1e-7.

    Args:
      student: embeddings, usually pooled features before the classifier.
      teacher: the same of the teacher, of any width; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, the distributions are over a device's own examples.

    Returns:
      One value for the batch, non-negative up to ε; zero where cosines agree. A zero row has cosine 0 with every
      row, itself included.

    References:
      Passalis, Tefas, `Learning Deep Representations with Probabilistic Knowledge Transfer
      <https://arxiv.org/abs/1803.10837>`_, 2018, section 3, as in the authors' code. Default weight in
      RepDistiller: 30000.
    """
    p, q = (_affinities(rows) for rows in _batches(student, teacher, axis_name))
    return jnp.mean(q * jnp.log((q + 1e-7) / (p + 1e-7)))


@checked
def similarity_preserving(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Similarity-preserving distillation (SP): squared difference of row-normalised Gram matrices of the batch.

    .. math:: \frac{1}{B^2} \left\| N(S S^\top) - N(T T^\top) \right\|_F^2

    with S and T one flattened example per row, and N scaling every row to unit 2-norm.

    Args:
      student: feature maps or embeddings.
      teacher: the same of the teacher, of any shape after the batch axis; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, the rows cover a device's own examples only.

    Returns:
      One non-negative value for the batch; zero where similarities are proportional row by row.

    References:
      Tung, Mori, `Similarity-Preserving Knowledge Distillation <https://arxiv.org/abs/1907.09682>`_, 2019, equations
      1 to 4. Default weight there: 3000 on the last feature maps.
    """
    student_rows, teacher_rows = (_unit(_gram(rows)) for rows in _batches(student, teacher, axis_name))
    return jnp.mean((student_rows - teacher_rows) ** 2)


@checked
def correlation_congruence(
    student: Float[Array, "batch dims"],
    teacher: Float[Array, "batch dims"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Correlation congruence (CC): products of the deviations from the teacher of consecutive examples.

    .. math:: \frac{1}{B - 1} \sum_{i=1}^{B-1} \sum_d |\delta_{id}| \, |\delta_{i+1,d}|, \qquad \delta = s - t

    The value depends on the order of the batch: shuffle the examples.

    Args:
      student: embeddings.
      teacher: embeddings of the same width; constant under differentiation.
      axis_name: gather the batch over this mapped axis, in its order. Without it, only the pairs across the borders
        of the shards are missing.

    Returns:
      One non-negative value for the batch; zero where the embeddings agree, and for a batch of one.

    References:
      Peng et al., `Correlation Congruence for Knowledge Distillation <https://arxiv.org/abs/1904.01802>`_, 2019, in
      the form of the authors' code that RepDistiller uses; section 3.3 of the paper compares kernel matrices instead.
      Default weight in RepDistiller: .02, on learnt embeddings of width 128.
    """
    student_rows, teacher_rows = _batches(student, teacher, axis_name)
    deviation = jnp.abs(student_rows - teacher_rows)
    return jnp.sum(deviation[:-1] * deviation[1:]) / max(len(deviation) - 1, 1)


@checked
def correlation_distance(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch classes"],
    *,
    temperature: Temperature = 1.0,
    rank_weight: Scalar = 0.0,
) -> Float[Array, "*batch"]:
    r"""Correlation distance (R2KD): one minus the correlation of the two predictions over the classes of an example.

    .. math:: 1 - \rho(\sigma(s / T), \sigma(t / T)) + w \, (1 - \rho(r(s), r(t))), \qquad
              r_c(z) = \sum_k \tanh\frac{z_c - z_k}{2}

    with Pearson's ρ and smooth ranks r, which tend to ranks for large differences of the logits. Unlike the other
    losses of this module it is defined per example, so sharding a batch changes nothing. There is no factor T²: a
    correlation has no scale, and its gradient keeps its size as T grows.

    Args:
      student_logits: logits of the student.
      teacher_logits: logits of the teacher; constant under differentiation.
      temperature: T > 0 of the predictions.
      rank_weight: weight w of the rank-based distance, which needs O(C²) memory per example; 0 leaves it out.

    Returns:
      One value from 0 to 2 + 2 w per example; zero where the predictions agree. Constant predictions, which have no
      correlation, are at distance 1/2 from others. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      Kim et al., `Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning
      <https://arxiv.org/abs/2311.13934>`_, 2024: a value-based and a rank-based distance. The smooth ranks are our own.
    """
    student, teacher = _live_pair(student_logits, teacher_logits)
    live = ~jnp.isneginf(student)
    p, q = (jnp.exp(_normalise(logits / temperature)) for logits in (student, teacher))
    loss = _one_minus_pearson(p, q, live)
    if isinstance(rank_weight, (int, float)) and rank_weight == 0:
        return loss
    ranked = live & ~jnp.isneginf(teacher)
    student_ranks, teacher_ranks = (_soft_ranks(logits, ranked) for logits in (student, teacher))
    return loss + rank_weight * _one_minus_pearson(student_ranks, teacher_ranks, ranked)


@checked
def info_nce(
    student: Float[Array, "batch dims"],
    teacher: Float[Array, "batch dims"],
    *,
    temperature: Positive = 0.1,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""InfoNCE: identify the teacher's embedding of the same example among those of the batch.

    .. math:: -\frac{1}{B} \sum_i \log \frac{\exp(\cos(s_i, t_i) / \tau)}{\sum_j \exp(\cos(s_i, t_j) / \tau)}

    Args:
      student: embeddings, usually of :class:`kdjax.models.heads.Embedding`; scaled to unit norm here.
      teacher: embeddings of the same width; constant under differentiation.
      temperature: τ > 0; small values emphasise the hardest negatives.
      axis_name: gather the batch over this mapped axis. Without it, negatives come from a device's own examples, and
        the value is lower by about log n.

    Returns:
      One non-negative value for the batch, at most ``log B + 2 / τ``; log B where all similarities are equal, 0 for a
      batch of one. It is not zero at equality.

    Raises:
      ValueError: if the temperature is not above 0.

    References:
      van den Oord, Li, Vinyals, `Representation Learning with Contrastive Predictive Coding
      <https://arxiv.org/abs/1807.03748>`_, 2018, section 2.3. Temperatures from .05 to .2 are usual; there it is 1.
    """
    student_rows, teacher_rows = (_unit(rows) for rows in _batches(student, teacher, axis_name))
    log_chances = jax.nn.log_softmax(_products(student_rows, teacher_rows) / temperature)
    return -jnp.mean(jnp.diagonal(log_chances))


@checked
def cka(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Centred kernel alignment (CKA): one minus the linear CKA of two representations.

    .. math:: 1 - \frac{\langle K, L \rangle}{\|K\|_F \|L\|_F} =
              \frac{1}{2} \left\| \frac{K}{\|K\|_F} - \frac{L}{\|L\|_F} \right\|_F^2

    with K and L the Gram matrices of the student's and the teacher's rows, centred over the batch. The right side is
    computed, since it is precise near zero. Invariant to rotation and scale of either space.

    Args:
      student: feature maps or embeddings.
      teacher: the same of the teacher, of any shape after the batch axis; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, a device uses its own examples only; the alignment
        is biased upwards where they are few compared with the width.

    Returns:
      One value from 0 to 1 for the batch; zero where the kernels are proportional. A batch of equal rows, whose kernel
      is zero, is at 1/2 from any other.

    References:
      Kornblith et al., `Similarity of Neural Network Representations Revisited <https://arxiv.org/abs/1905.00414>`_,
      2019, section 3, equation 1 with the linear kernel, as a measure of similarity. Usual weight as a loss: about
      1.
    """
    k, ell = (_unit(_centred_gram(rows).reshape(-1)) for rows in _batches(student, teacher, axis_name))
    return 0.5 * jnp.sum((k - ell) ** 2)


class CrdMemory(NamedTuple):
    """Memory bank of :func:`crd`: embeddings of every training example, equal on all devices."""

    student: Float[Array, "examples dims"]  # unit rows once visited
    teacher: Float[Array, "examples dims"]
    student_z: Float[Array, ""]  # Z of the student's scores; 0 until the first step sets it
    teacher_z: Float[Array, ""]


@checked
def init_crd_memory(key: jax.Array, *, examples: int, dims: int) -> CrdMemory:
    """Memory of :func:`crd` before the first step: random rows of about unit norm.

    Args:
      key: randomness, ``jax.random.key(...)``.
      examples: size of the training set.
      dims: width of the embeddings; 128 in the paper.

    Raises:
      ValueError: if either is not positive.
    """
    if examples < 1 or dims < 1:
        raise ValueError(
            f"init_crd_memory needs at least one example and dimension, got {examples} and {dims}."
        )
    bound = (3 / dims) ** 0.5
    banks = jax.random.uniform(key, (2, examples, dims), jnp.float32, -bound, bound)
    return CrdMemory(banks[0], banks[1], jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


@checked
def crd_candidates(
    key: jax.Array,
    index: Int[Array, " batch"],
    *,
    negatives: int,
    examples: int,
    labels: Int[Array, " examples"] | None = None,
) -> Int[Array, "batch candidates"]:
    """Draws the memory rows that :func:`crd` compares each example with: its own row, then random negatives.

    Negatives are drawn uniformly with replacement; the authors draw without replacement where there are enough.

    Args:
      key: randomness of this step; under a mapped axis fold in the axis index, so that the devices draw differently.
      index: of each example in the training set.
      negatives: number per example; 16384 in the paper for 50,000 examples.
      examples: size of the training set.
      labels: of the training set. If given, negatives are of other classes, the authors' choice on CIFAR-100, at the
        cost of sorting the labels (about 8 ms for 50,000 on one core). An example with a void label is never a
        negative, and has all labelled examples as negatives. Without labels, any other example is a negative.

    Returns:
      Indices, the positive in column 0.

    Raises:
      ValueError: if ``negatives`` is below 1 or ``examples`` below 2.
    """
    if negatives < 1 or examples < 2:
        raise ValueError(
            f"crd_candidates needs a negative and two examples at least, got {negatives} and {examples}."
        )
    void: Any = 0
    if labels is None:
        order, start, size = jnp.arange(examples), index, jnp.ones_like(index)
    else:  # sorted by class, the examples to leave out are one block, and the void ones at the front
        order = jnp.argsort(labels)
        ordered, own = labels[order], labels[index]
        void = jnp.searchsorted(ordered, 0)
        start = jnp.searchsorted(ordered, own)
        size = jnp.where(own < 0, 0, jnp.searchsorted(ordered, own, side="right") - start)
    start, size = start[:, None], size[:, None]
    shape = (len(index), negatives)
    drawn = void + jax.random.randint(
        key, shape, 0, jnp.broadcast_to(jnp.maximum(examples - void - size, 1), shape)
    )
    others = order[jnp.where(drawn < start, drawn, drawn + size) % examples]
    return jnp.concatenate([index[:, None], others.astype(index.dtype)], axis=1)


@checked
def crd(
    student_embedding: Float[Array, "batch dims"],
    teacher_embedding: Float[Array, "batch dims"],
    memory: CrdMemory,
    candidates: Int[Array, "batch candidates"],
    *,
    temperature: Positive = 0.07,
    momentum: Share = 0.5,
    axis_name: str | None = None,
) -> tuple[Float[Array, " batch"], CrdMemory]:
    r"""Contrastive representation distillation (CRD): identify each example among many others in a memory bank.

    .. math:: \sum_{(v, M)} \left[ -\log\frac{P_0}{P_0 + c} - \sum_{k=1}^{K} \log\frac{K/n}{P_k + c} \right], \qquad
              P_k = \frac{e^{\langle v, M_k \rangle / \tau}}{Z}, \qquad c = \frac{K}{n} + 10^{-7}

    with n training examples, summed over the student's embedding v with the teacher's memory M and the teacher's
    embedding with the student's memory. The loss reads the memory as it was before the step. Then each visited row
    becomes the unit vector along momentum · row + (1 - momentum) · embedding. Z is set once, by the first batch, to n
    times its mean exponential.

    Args:
      student_embedding: unit rows, from a learnt projection (:class:`kdjax.models.heads.Embedding`) of the
        student's features.
      teacher_embedding: unit rows, from a learnt projection of the teacher's features. *Not* constant, since this loss
        trains the projection: apply ``jax.lax.stop_gradient`` to the features before it.
      memory: as returned by the step before, or by :func:`init_crd_memory`.
      candidates: rows of the memory to compare with, the example's own in column 0, from :func:`crd_candidates`. A
        batch must not hold an example twice.
      temperature: τ > 0.
      momentum: weight of the old row, from 0 to 1.
      axis_name: the mapped axis over which the batch is sharded. The loss of an example does not depend on the rest of
        the batch, so the values are the same; with it, every memory receives the embeddings of all devices, and Z is of
        the whole first batch. Without it the devices' memories would differ.

    Returns:
      One non-negative value per example, to reduce with ``jnp.mean``, and the memory for the next step, without
      gradient.

    Raises:
      ValueError: if the temperature is not above 0, or the momentum is outside [0, 1].

    References:
      Tian, Krishnan, Isola, `Contrastive Representation Distillation <https://arxiv.org/abs/1910.10699>`_, 2020,
      section 3.2 and the supplement on implementation. Default weight there: .8, with 16384 negatives and width 128.
    """
    student, teacher = student_embedding.astype(jnp.float32), teacher_embedding.astype(jnp.float32)
    student_scores = _scores(student, memory.teacher, candidates) / temperature
    teacher_scores = _scores(teacher, memory.student, candidates) / temperature
    examples = len(memory.student)
    student_z = _first_z(memory.student_z, student_scores, examples, axis_name)
    teacher_z = _first_z(memory.teacher_z, teacher_scores, examples, axis_name)
    loss = _noise_contrast(student_scores, student_z, examples)
    loss += _noise_contrast(teacher_scores, teacher_z, examples)
    visited = candidates[:, 0]
    if axis_name is not None:
        visited = jax.lax.all_gather(visited, axis_name, tiled=True)
    return loss, CrdMemory(
        _remembered(memory.student, visited, student, momentum, axis_name),
        _remembered(memory.teacher, visited, teacher, momentum, axis_name),
        student_z,
        teacher_z,
    )


def _batches(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    axis_name: str | None,
) -> tuple[Float[Array, "whole student_dims"], Float[Array, "whole teacher_dims"]]:
    """One float32 row per example of both networks, of the whole batch if an axis is named; the teacher's constant.

    The gradient of a gathered array returns to the device it came from, summed over the devices. So each device holds n
    times its part of the gradient, and the mean over devices is the whole gradient.
    """
    student_rows = student.astype(jnp.float32).reshape(len(student), -1)
    teacher_rows = jax.lax.stop_gradient(teacher).astype(jnp.float32).reshape(len(teacher), -1)
    if axis_name is None:
        return student_rows, teacher_rows
    return jax.lax.all_gather((student_rows, teacher_rows), axis_name, tiled=True)


def _products(a: Float[Array, "rows dims"], b: Float[Array, "columns dims"]) -> Float[Array, "rows columns"]:
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def _gram(rows: Float[Array, "batch dims"]) -> Float[Array, "batch batch"]:
    return _products(rows, rows)


@_gram.defjvp
def _gram_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The tangent is a product plus its transpose, so the gradient needs one product only."""
    half = _products(*tangents, *primals)
    return _gram(*primals), half + half.T


def _centred_gram(rows: Float[Array, "batch dims"]) -> Float[Array, "batch batch"]:
    """Gram matrix of the deviations from the mean row, which reduces the cancellation in differences.

    Zero, with a zero gradient, where the rows are constant up to rounding. The mean is a matrix product, since XLA's
    CPU backend is slow at sums over the first axis.
    """
    mean = jnp.matmul(jnp.full((1, len(rows)), 1 / len(rows)), rows, precision=jax.lax.Precision.HIGHEST)
    products = _gram(rows - mean)
    varies = jnp.trace(products)
    size = varies + len(rows) * jnp.sum(mean**2)
    return jnp.where(varies <= 1e-11 * size, 0, products)


def _varying(deviation: Float[Array, "*batch dims"], x: Float[Array, "*batch dims"]) -> Array:
    """The deviations of x; zero, with a zero gradient, where x is constant up to rounding."""
    varies, size = (jnp.sum(v**2, axis=-1, keepdims=True) for v in (deviation, x))
    return jnp.where(varies <= 1e-11 * size, 0, deviation)


def _unit(rows: Float[Array, "*batch dims"]) -> Float[Array, "*batch dims"]:
    """Rows of unit 2-norm; norms below 1e-12 count as 1e-12, so no square root is differentiated at zero."""
    return rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(rows**2, axis=-1, keepdims=True), 1e-24))


def _distances(
    gram: Float[Array, "batch batch"],
) -> tuple[Float[Array, "batch batch"], Float[Array, "batch batch"]]:
    """Distances between rows and their inverses, both zero where rows are equal up to rounding."""
    norms = jnp.diagonal(gram)
    norms = norms[:, None] + norms[None, :]
    squared = norms - 2 * gram
    apart = ~(squared <= 1e-12 + 5e-7 * norms) & ~jnp.eye(len(gram), dtype=bool)
    inverse = jnp.where(apart, jax.lax.rsqrt(jnp.where(apart, squared, 1)), 0)
    return squared * inverse, inverse


def _cosines(
    gram: Float[Array, "batch batch"],
    row: Float[Array, " batch"],
    norm: Float[Array, ""],
    inverse: Float[Array, " batch"],
) -> Float[Array, "batch batch"]:
    """Cosines of the angles at one anchor, from its row of the Gram matrix and of the inverse distances."""
    return (gram - row[:, None] - row[None, :] + norm) * inverse[:, None] * inverse[None, :]


def _affinities(rows: Float[Array, "batch dims"]) -> Float[Array, "batch batch"]:
    """Rows of (cos + 1) / 2, each summing to one."""
    squared = jnp.sum(rows**2, axis=1, keepdims=True)
    norm = jnp.sqrt(jnp.where(squared == 0, 1, squared))
    cosines = _gram(jnp.where(squared == 0, 0, rows / (norm + 1e-7)))
    near = jnp.maximum(cosines + 1, 0)  # rounding may leave a cosine below -1
    return near / jnp.sum(near, axis=1, keepdims=True)


def _one_minus_pearson(
    a: Float[Array, "*batch classes"], b: Float[Array, "*batch classes"], live: Bool[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """Half the squared distance of the centred unit rows, exact at equality; over the live classes."""
    count = jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1)
    means = (jnp.sum(jnp.where(live, x, 0), axis=-1, keepdims=True) / count for x in (a, b))
    a, b = (_unit(_varying(jnp.where(live, x - mean, 0), x)) for x, mean in zip((a, b), means, strict=True))
    return 0.5 * jnp.sum((a - b) ** 2, axis=-1)


def _soft_ranks(
    logits: Float[Array, "*batch classes"], live: Bool[Array, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """Smooth ranks among the live classes; 0 for the others."""
    logits = jnp.where(live, logits, 0)
    difference = logits[..., :, None] - logits[..., None, :]
    pairs = live[..., :, None] & live[..., None, :]
    return jnp.sum(jnp.where(pairs, jnp.tanh(difference / 2), 0), axis=-1)


def _scores(
    embedding: Float[Array, "batch dims"],
    bank: Float[Array, "examples dims"],
    candidates: Int[Array, "batch candidates"],
) -> Float[Array, "batch candidates"]:
    """Inner products with the candidate rows of the memory.

    With many candidates, computing all products and picking some is faster than gathering rows, and needs less memory.
    """
    bank = jax.lax.stop_gradient(bank)
    if len(bank) <= _DENSE_BELOW * candidates.shape[1]:
        return jnp.take_along_axis(_products(embedding, bank), candidates, axis=1)
    return jnp.einsum("bd,bkd->bk", embedding, bank[candidates], precision=jax.lax.Precision.HIGHEST)


def _first_z(
    z: Float[Array, ""], scores: Float[Array, "batch candidates"], examples: int, axis_name: str | None
) -> Float[Array, ""]:
    """Z, or, where it is not set yet, the number of examples times the mean exponential of the scores."""
    log_mean = jax.nn.logsumexp(jax.lax.stop_gradient(scores)) - jnp.log(float(scores.size))
    if axis_name is not None:
        logs = jax.lax.all_gather(log_mean, axis_name)
        log_mean = jax.nn.logsumexp(logs) - jnp.log(float(len(logs)))
    log_z = jnp.clip(log_mean + jnp.log(float(examples)), -80, 80)
    return jax.lax.stop_gradient(jnp.where(z > 0, z, jnp.exp(log_z)))


def _noise_contrast(
    scores: Float[Array, "batch candidates"], z: Float[Array, ""], examples: int
) -> Float[Array, " batch"]:
    """Both log-probabilities as a softplus of log P - log c, which neither overflows nor underflows."""
    noise = (scores.shape[1] - 1) / examples
    odds = scores - jnp.log(z) - jnp.log(noise + 1e-7)
    negatives = jnp.sum(jax.nn.softplus(odds[:, 1:]) + jnp.log1p(1e-7 / noise), axis=1)
    return jax.nn.softplus(-odds[:, 0]) + negatives


def _remembered(
    bank: Float[Array, "examples dims"],
    visited: Int[Array, " whole"],
    embedding: Float[Array, "batch dims"],
    momentum: Scalar,
    axis_name: str | None,
) -> Float[Array, "examples dims"]:
    bank, embedding = jax.lax.stop_gradient((bank, embedding))
    if axis_name is not None:
        embedding = jax.lax.all_gather(embedding, axis_name, tiled=True)
    return bank.at[visited].set(_unit(momentum * bank[visited] + (1 - momentum) * embedding))
