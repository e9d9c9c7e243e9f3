r"""Losses between relations: how the examples of a batch lie to each other, for the teacher and for the student.

The two networks need not agree in width, since what is compared has one row and column per example. All compute in
float32, whatever comes in, with products in full float32, since differences of inner products cancel. A relation that
does not exist (of a zero vector, between equal rows, in a batch of one) adds nothing and has a zero gradient.

**A batch in parts.** These losses are not means over examples. With the batch cut over n devices, the mean of the
losses of the parts sees only the pairs within each, one in n of all (of triples one in n²), and normalises by a part's
own statistics: another loss, usually noisier. With ``axis_name`` every function gathers the batch over that mapped axis
first, and returns the value of the whole batch on every device. Its gradient with respect to a device's parameters,
averaged over the axis as the train step does, is the gradient of that value; Hessian-vector products likewise. (Under
``shard_map`` that holds with ``check_vma=False``, as in :mod:`kdjax.parallel`.) Every device does the work of the whole
batch, which is small beside that of a network.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from kdjax.losses._checks import Positive, Share, Temperature, checked
from kdjax.losses.logits import _live_pair, _normalise
from kdjax.types import Scalar

_ANGLES_AT_ONCE = 2**20  # scalars that rkd_angle holds per array, 4 MiB: few enough for a cache
_DENSE_BELOW = 32  # rows of the memory per candidate, up to which all products are taken


@checked
def rkd_distance(
    student: Float[Array, "batch *student_features"],
    teacher: Float[Array, "batch *teacher_features"],
    *,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Relational distillation of distances: pairs far apart for the teacher are to be far apart for the student.

    Known as RKD-D.

    .. math:: \frac{1}{B^2} \sum_{ij} h\!\left(\frac{\|s_i - s_j\|}{\mu_s} - \frac{\|t_i - t_j\|}{\mu_t}\right), \qquad
              h(x) = \begin{cases} x^2/2 & |x| \le 1 \\ |x| - 1/2 & \text{otherwise} \end{cases}

    with :math:`\mu` the mean distance over all pairs. Invariant to the scale of either network's features.

    Args:
      student: embeddings, usually pooled features before the classifier.
      teacher: likewise, of any width; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, a device compares only its own B²/n² pairs and
        normalises by their mean distance.

    Returns:
      One non-negative value for the batch; zero where distances are proportional. Rows closer than a thousandth of
      their distance from the centre of the batch count as equal: float32 inner products tell no more.

    Cost:
      O(B²·D) time, O(B² + B·D) memory.

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
    r"""Relational distillation of angles: every triple of examples spans the same angle for both networks.

    Known as RKD-A.

    .. math:: \frac{1}{B^3} \sum_{ijk} h(\cos\angle s_j s_i s_k - \cos\angle t_j t_i t_k)

    with h as in :func:`rkd_distance`. The cosines come from the matrix of inner products,
    :math:`\langle s_j - s_i, s_k - s_i\rangle = G_{jk} - G_{ij} - G_{ik} + G_{ii}`, so that the B²·D differences are
    never formed, and those of a few anchors i at a time, so that a large batch needs no B³ memory either.

    Args:
      student: embeddings, usually pooled features before the classifier.
      teacher: likewise, of any width; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, a device compares only its own B³/n³ triples.

    Returns:
      One non-negative value for the batch; zero where angles agree. Angles at equal rows (see :func:`rkd_distance`)
      have cosine 0.

    Cost:
      O(B³ + B²·D) time, O(B² + B·D) memory, the triples of a few anchors at a time.

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
    r"""Probabilistic knowledge transfer: who is near whom, as one distribution over the batch for each example.

    Known as PKT.

    .. math:: \frac{1}{B^2} \sum_{ij} q_{ij} \log\frac{q_{ij} + \epsilon}{p_{ij} + \epsilon}, \qquad
              p_{ij} = \frac{\cos(s_i, s_j) + 1}{\sum_k (\cos(s_i, s_k) + 1)}

    with q likewise from the teacher and ε = 1e-7.

    Args:
      student: embeddings, usually pooled features before the classifier.
      teacher: likewise, of any width; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, neighbours are looked for among a device's own
        examples, and the distributions are over those.

    Returns:
      One value for the batch, non-negative up to ε; zero where cosines agree. A zero row has cosine 0 with every
      row, itself included.

    Cost:
      O(B²·D) time, O(B² + B·D) memory.

    References:
      Passalis, Tefas, `Learning Deep Representations with Probabilistic Knowledge Transfer
      <https://arxiv.org/abs/1803.10837>`_, 2018, section 3, as in the authors' code. Default weight, in the CRD
      benchmark: 30000.
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
    r"""Pairs that activate the teacher alike are to activate the student alike.

    Known as SP.

    .. math:: \frac{1}{B^2} \left\| N(S S^\top) - N(T T^\top) \right\|_F^2

    with S and T one flattened example per row, and N scaling every row to unit 2-norm.

    Args:
      student: feature maps or embeddings.
      teacher: likewise, of any shape behind the batch; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, rows hold, and are normalised over, a device's own
        examples only.

    Returns:
      One non-negative value for the batch; zero where similarities are proportional row by row.

    Cost:
      O(B²·D) time, O(B² + B·D) memory.

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
    r"""Congruence of neighbours in the batch: deviations from the teacher are not to occur together.

    Known as CC.

    .. math:: \frac{1}{B - 1} \sum_{i=1}^{B-1} \sum_d |\delta_{id}| \, |\delta_{i+1,d}|, \qquad \delta = s - t

    It depends on the order of the batch, being over consecutive examples: shuffle, as any training does.

    Args:
      student: embeddings.
      teacher: embeddings of the same width; constant under differentiation.
      axis_name: gather the batch over this mapped axis, in its order. Without it, only the pairs across the borders
        of the parts are missing.

    Returns:
      One non-negative value for the batch; zero where the embeddings agree, and for a batch of one.

    Cost:
      O(B·D) time, O(B·D) memory.

    References:
      Peng et al., `Correlation Congruence for Knowledge Distillation <https://arxiv.org/abs/1904.01802>`_, 2019, in
      the form of the authors' code that the CRD benchmark uses; section 3.3 of the paper compares kernel matrices
      instead. Default weight in the benchmark: .02, on learnt embeddings of width 128.
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
    rank_temperature: Positive = 1.0,
) -> Float[Array, "*batch"]:
    r"""One minus the correlation, over the classes of an example, of what the two networks predict.

    Known as R2KD.

    .. math:: 1 - \rho(\sigma(s / T), \sigma(t / T)) + w \, (1 - \rho(r(s), r(t))), \qquad
              r_c(z) = \sum_k \tanh\frac{z_c - z_k}{2 T_r}

    with Pearson's ρ; r tends to ranks, and the second term to Spearman's distance, as T_r → 0. Unlike the others
    here this is defined per example, so cutting a batch changes nothing. There is no factor T²: a correlation knows
    no scale, and its gradient keeps its size as T grows.

    Args:
      student_logits: unnormalised scores of the student.
      teacher_logits: unnormalised scores of the teacher; constant under differentiation.
      temperature: softening T > 0 of the predictions.
      rank_weight: weight w of the rank-based distance; 0 leaves it out, with its memory of classes² per example.
      rank_temperature: difference of scores, T_r > 0, that counts as a difference in rank.

    Returns:
      One value from 0 to 2 + 2 w per example; zero where the predictions agree. Constant predictions, which have no
      correlation, are at distance 1/2 from others. Reduce with ``jnp.mean``.

    Raises:
      ValueError: if a temperature is not above 0.

    Cost:
      O(B·C) time, O(B·C) memory. With the rank-based distance O(B·C²) of both.

    References:
      Kim et al., `Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning
      <https://arxiv.org/abs/2311.13934>`_, 2024: a value-based and a rank-based distance. The smooth ranks are ours.
    """
    student, teacher = _live_pair(student_logits, teacher_logits)
    live = ~jnp.isneginf(student)
    p, q = (jnp.exp(_normalise(logits / temperature)) for logits in (student, teacher))
    loss = _one_minus_pearson(p, q, live)
    if isinstance(rank_weight, (int, float)) and rank_weight == 0:
        return loss
    ranked = live & ~jnp.isneginf(teacher)
    student_ranks, teacher_ranks = (
        _soft_ranks(logits, ranked, rank_temperature) for logits in (student, teacher)
    )
    return loss + rank_weight * _one_minus_pearson(student_ranks, teacher_ranks, ranked)


@checked
def info_nce(
    student: Float[Array, "batch dims"],
    teacher: Float[Array, "batch dims"],
    *,
    temperature: Positive = 0.1,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    r"""Each student embedding is to tell its own teacher embedding from those of the rest of the batch.

    Known as InfoNCE.

    .. math:: -\frac{1}{B} \sum_i \log \frac{\exp(\cos(s_i, t_i) / \tau)}{\sum_j \exp(\cos(s_i, t_j) / \tau)}

    Args:
      student: embeddings, usually of :class:`kdjax.models.heads.Embedding`; scaled to unit norm here.
      teacher: embeddings of the same width; constant under differentiation.
      temperature: τ > 0; small values attend to the hardest negatives.
      axis_name: gather the batch over this mapped axis. Without it, negatives come from a device's own examples: the
        task is easier and the value lower, by about log n.

    Returns:
      One non-negative value for the batch, at most ``log B + 2 / τ``; log B where nothing can be told apart. It is not
      zero at equality. Zero for a batch of one.

    Raises:
      ValueError: if the temperature is not above 0.

    Cost:
      O(B²·D) time, O(B² + B·D) memory.

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
    r"""One minus the linear centred kernel alignment (CKA) of two representations: a loss, not the similarity.

    Known as CKA.

    .. math:: 1 - \frac{\langle K, L \rangle}{\|K\|_F \|L\|_F} =
              \frac{1}{2} \left\| \frac{K}{\|K\|_F} - \frac{L}{\|L\|_F} \right\|_F^2

    with K and L the inner products of the student's and teacher's rows after the mean of the batch is taken off. The
    right side, which is computed, keeps its digits near zero. Invariant to rotation and scale of either space.

    Args:
      student: feature maps or embeddings.
      teacher: likewise, of any shape behind the batch; constant under differentiation.
      axis_name: gather the batch over this mapped axis. Without it, a device centres and aligns its own examples;
        alignment is biased upwards the fewer they are compared with the width.

    Returns:
      One value from 0 to 1 for the batch; zero where the kernels are proportional. A batch of equal rows has no
      kernel and is at 1/2 from any that has.

    Cost:
      O(B²·D) time, O(B² + B·D) memory.

    References:
      Kornblith et al., `Similarity of Neural Network Representations Revisited <https://arxiv.org/abs/1905.00414>`_,
      2019, section 3, equation 1 with the linear kernel. A measure there; as a loss its weight is about 1.
    """
    k, ell = (_unit(_centred_gram(rows).reshape(-1)) for rows in _batches(student, teacher, axis_name))
    return 0.5 * jnp.sum((k - ell) ** 2)


class CrdMemory(NamedTuple):
    """What :func:`crd` remembers of every training example; the same on every device."""

    student: Float[Array, "examples dims"]  # unit rows but for those never visited
    teacher: Float[Array, "examples dims"]
    student_z: Float[Array, ""]  # normalises the student's scores; 0 until the first step sets it for good
    teacher_z: Float[Array, ""]


@checked
def init_crd_memory(key: jax.Array, *, examples: int, dims: int) -> CrdMemory:
    """Memory before the first step: uniform rows of about unit norm.

    Args:
      key: of the random rows.
      examples: in the training set.
      dims: width of the embeddings; 128 in the paper.

    Raises:
      ValueError: if either is not positive.

    Cost:
      O(N·D) time, O(N·D) memory.
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
    """The rows of the memory that each example is compared with: its own, then random others.

    Negatives are drawn evenly and with replacement; the authors draw without it when there are enough.

    Args:
      key: of this step; under a mapped axis fold in its index, so that the devices draw apart.
      index: of each example in the training set.
      negatives: per example; 16384 in the paper for 50,000 examples.
      examples: in the training set.
      labels: of the training set. If given, negatives are of other classes, the authors' choice on CIFAR-100, at the
        cost of sorting the labels (some 8 ms for 50,000 on one core); otherwise any other example. An example whose
        label is void is nobody's negative, and has all that are labelled for negatives.

    Returns:
      Indices, the positive in column 0.

    Raises:
      ValueError: if there is nothing to draw from.

    Cost:
      O(N + B·K) time, O(N + B·K) memory. With labels, a sort besides: O(N·log N) time.
    """
    if negatives < 1 or examples < 2:
        raise ValueError(
            f"crd_candidates needs a negative and two examples at least, got {negatives} and {examples}."
        )
    void: Any = 0
    if labels is None:
        order, start, size = jnp.arange(examples), index, jnp.ones_like(index)
    else:  # with the examples sorted by class, those to leave out are a block, besides the void ones in front
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
    r"""Contrastive representation distillation (CRD): tell each example's embedding from those of many others.

    Known as CRD.

    .. math:: \sum_{(v, M)} \left[ -\log\frac{P_0}{P_0 + c} - \sum_{k=1}^{K} \log\frac{K/n}{P_k + c} \right], \qquad
              P_k = \frac{e^{\langle v, M_k \rangle / \tau}}{Z}, \qquad c = \frac{K}{n} + 10^{-7}

    summed over the student's embedding v with the teacher's memory M, and the teacher's with the student's. The
    memory is read as it was before the step, and then moves: each visited row becomes the unit vector along
    momentum · row + (1 - momentum) · embedding. Z is set once, by the first batch, to n times its mean exponential.

    Args:
      student_embedding: unit rows, from a learnt projection (:class:`kdjax.models.heads.Embedding`) of the
        student's features.
      teacher_embedding: unit rows, from a learnt projection of the teacher's features. *Not* constant, since its
        projection learns from this loss: apply ``jax.lax.stop_gradient`` to the features before it.
      memory: as returned by the step before, or by :func:`init_crd_memory`.
      candidates: rows of the memory to compare with, the example's own in column 0, from :func:`crd_candidates`. No
        two examples of a batch may be the same.
      temperature: τ > 0.
      momentum: weight of the old row, from 0 to 1.
      axis_name: the mapped axis that the batch is cut over. The loss of an example depends on the memory and on
        no other example, so the values are the same; with it, every device's memory receives every device's
        embeddings and the first batch's Z is of the whole batch. Without it the memories would drift apart.

    Returns:
      One non-negative value per example, to reduce with ``jnp.mean``, and the memory for the next step, without
      gradient.

    Raises:
      ValueError: if the temperature is not above 0, or the momentum is outside [0, 1].

    Cost:
      O(B·K·D) time, O(B·K·D + N·D) memory. Up to N = 32 K all products with the memory are taken instead, in
      O(B·N·D) time and O(B·N + N·D) memory. N·D is the next memory, which takes the place of the last where that is
      donated to the step.

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
    """Both as one float32 row per example, of the whole batch if an axis is named; the teacher's constant.

    The gradient of a gathered array goes back to the device that it came from, summed over the devices. So each device
    finds n times its part of the gradient of the common value, and their mean is the whole.
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
    """Of the two products that it consists of one is the other's transpose; so the gradient takes one product too."""
    half = _products(*tangents, *primals)
    return _gram(*primals), half + half.T


def _centred_gram(rows: Float[Array, "batch dims"]) -> Float[Array, "batch batch"]:
    """Products of deviations from the mean row; the same differences, without most of the cancellation.

    Zero, with a zero gradient, where the rows vary no more than rounding does. The mean is a product, since XLA's CPU
    backend is slow at sums down a column.
    """
    mean = jnp.matmul(jnp.full((1, len(rows)), 1 / len(rows)), rows, precision=jax.lax.Precision.HIGHEST)
    products = _gram(rows - mean)
    varies = jnp.trace(products)
    size = varies + len(rows) * jnp.sum(mean**2)
    return jnp.where(varies <= 1e-11 * size, 0, products)


def _varying(deviation: Float[Array, "*batch dims"], x: Float[Array, "*batch dims"]) -> Array:
    """The deviations of x, or zeros, with a zero gradient, where x varies no more than rounding does."""
    varies, size = (jnp.sum(v**2, axis=-1, keepdims=True) for v in (deviation, x))
    return jnp.where(varies <= 1e-11 * size, 0, deviation)


def _unit(rows: Float[Array, "*batch dims"]) -> Float[Array, "*batch dims"]:
    """Scaled to unit 2-norm; norms below 1e-12 count as 1e-12. No square root is taken, or differentiated, at zero."""
    return rows * jax.lax.rsqrt(jnp.maximum(jnp.sum(rows**2, axis=-1, keepdims=True), 1e-24))


def _distances(
    gram: Float[Array, "batch batch"],
) -> tuple[Float[Array, "batch batch"], Float[Array, "batch batch"]]:
    """Distances between rows and their inverses, both zero where rows are equal to the precision of the products."""
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
    """Cosines of the angles at one anchor, from its row of the inner products and of the inverse distances."""
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
    """As half the squared distance of the standardised rows, exact at equality; over the classes that are live."""
    count = jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1)
    means = (jnp.sum(jnp.where(live, x, 0), axis=-1, keepdims=True) / count for x in (a, b))
    a, b = (_unit(_varying(jnp.where(live, x - mean, 0), x)) for x, mean in zip((a, b), means, strict=True))
    return 0.5 * jnp.sum((a - b) ** 2, axis=-1)


def _soft_ranks(
    logits: Float[Array, "*batch classes"], live: Bool[Array, "*batch classes"], temperature: Scalar
) -> Float[Array, "*batch classes"]:
    """Ranks among the live classes, smoothed; 0 for the others."""
    logits = jnp.where(live, logits, 0)
    difference = logits[..., :, None] - logits[..., None, :]
    pairs = live[..., :, None] & live[..., None, :]
    return jnp.sum(jnp.where(pairs, jnp.tanh(difference / (2 * temperature)), 0), axis=-1)


def _scores(
    embedding: Float[Array, "batch dims"],
    bank: Float[Array, "examples dims"],
    candidates: Int[Array, "batch candidates"],
) -> Float[Array, "batch candidates"]:
    """Inner products with chosen rows of the memory.

    With many candidates it is faster, and smaller by the width, to take all products and pick among them than to
    gather rows.
    """
    bank = jax.lax.stop_gradient(bank)
    if len(bank) <= _DENSE_BELOW * candidates.shape[1]:
        return jnp.take_along_axis(_products(embedding, bank), candidates, axis=1)
    return jnp.einsum("bd,bkd->bk", embedding, bank[candidates], precision=jax.lax.Precision.HIGHEST)


def _first_z(
    z: Float[Array, ""], scores: Float[Array, "batch candidates"], examples: int, axis_name: str | None
) -> Float[Array, ""]:
    """The constant as it is, or, where it is not set yet, the number of examples times the mean exponential."""
    log_mean = jax.nn.logsumexp(jax.lax.stop_gradient(scores)) - jnp.log(float(scores.size))
    if axis_name is not None:
        logs = jax.lax.all_gather(log_mean, axis_name)
        log_mean = jax.nn.logsumexp(logs) - jnp.log(float(len(logs)))
    log_z = jnp.clip(log_mean + jnp.log(float(examples)), -80, 80)
    return jax.lax.stop_gradient(jnp.where(z > 0, z, jnp.exp(log_z)))


def _noise_contrast(
    scores: Float[Array, "batch candidates"], z: Float[Array, ""], examples: int
) -> Float[Array, " batch"]:
    """Both log-probabilities as softplus of log P - log c, which neither overflows nor loses a small P."""
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
