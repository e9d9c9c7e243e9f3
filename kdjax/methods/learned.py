"""Terms with parameters or a memory: linen modules that are trained beside the student and then dropped.

Each is called with the term's :class:`~kdjax.methods.method.View` of the student and of the teacher, and the batch.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from kdjax import losses
from kdjax.methods.method import View
from kdjax.models import heads
from kdjax.parallel import AXIS
from kdjax.types import Batch


def boundary_weights(maps: Sequence[Array]) -> list[float]:
    """Heo's weights of n maps, shallowest first: 2^(i + 1 - n) / 1000."""
    return [2.0 ** (i + 1 - len(maps)) / 1000 for i in range(len(maps))]


class NoisyTeacher(nn.Module):
    """Distillation from scores that are perturbed anew in every step for half of the examples."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The soft loss at temperature 4."""
        noisy = losses.noisy_teacher(teacher.logits, self.make_rng("dropout"), deviation=0.1, probability=0.5)
        return jnp.mean(losses.soft_target_kl(student.logits, noisy, temperature=4.0))


class Hints(nn.Module):
    """Each map of the student through a regressor."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The sum over the maps."""
        total = jnp.zeros(())
        for s, t in zip(student.features, teacher.features, strict=True):
            total += jnp.mean(losses.hint(heads.Regressor(t.shape[-1], axis_name=AXIS)(s, train=train), t))
        return total


class FactorTransfer(nn.Module):
    """Translator and paraphraser of one map.

    The paraphraser learns to reconstruct the teacher's map while the student is trained, not before.
    """

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> tuple[Array, Array]:
        """The distance of the factors, and what the paraphraser learns from."""
        (s,), (t,) = student.features, teacher.features
        t = jax.lax.stop_gradient(t)
        factors, restored = heads.FactorParaphraser(max(t.shape[-1] // 2, 1))(t)
        translator = heads.FactorTranslator(factors.shape[-1], axis_name=AXIS)
        loss = jnp.mean(losses.factor_transfer(translator(s, train=train), factors))
        return loss, jnp.mean(losses.hint(restored, t))


class Boundaries(nn.Module):
    """Maps before the ReLU, through connectors where channels differ, against the signs of the teacher's."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The weighted sum over the maps."""
        total = jnp.zeros(())
        weights = boundary_weights(teacher.features)
        for weight, s, t in zip(weights, student.features, teacher.features, strict=True):
            if s.shape[-1] != t.shape[-1]:
                s = heads.Regressor(t.shape[-1], activation=lambda x: x, axis_name=AXIS)(s, train=train)
            total += 3 * weight * jnp.mean(losses.activation_boundary(s, t))
        return total


class Overhaul(nn.Module):
    """Maps before the ReLU through connectors, against what the teacher's ReLU lets through.

    The margin is what the paper derives from a normalisation before the ReLU, measured: the mean of the teacher's
    negative values in the batch. A residual sum has no normalisation of its own to derive it from.
    """

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The weighted sum over the maps."""
        total = jnp.zeros(())
        weights = boundary_weights(teacher.features)
        for weight, s, t in zip(weights, student.features, teacher.features, strict=True):
            below, count = jnp.minimum(t, 0).sum((0, 1, 2)), (t < 0).sum((0, 1, 2))
            below, count = jax.lax.psum((below, count), AXIS)
            connector = heads.Regressor(t.shape[-1], activation=lambda x: x, axis_name=AXIS)
            margin = below / jnp.maximum(count, 1)
            total += weight * jnp.mean(losses.ofd(connector(s, train=train), t, margin=margin))
        return total


class Review(nn.Module):
    """From the deepest map to the shallowest, each joined with what was seen below it."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The sum over the maps; the embeddings are the deepest, as maps of one position."""
        total, mixture = jnp.zeros(()), None
        hidden = min(512, student.features[-1].shape[-1])
        for s, t in reversed(list(zip(student.features, teacher.features, strict=True))):
            s, t = (x[:, None, None] if x.ndim == 2 else x for x in (s, t))
            fusion = heads.ReviewFusion(t.shape[-1], hidden, axis_name=AXIS)
            read, mixture = fusion(s, mixture, train=train)
            total += jnp.mean(losses.reviewkd(read, t))
        return total


class VariationalInformation(nn.Module):
    """A head for each map, that predicts the teacher's."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The sum over the maps."""
        total = jnp.zeros(())
        for s, t in zip(student.features, teacher.features, strict=True):
            mean, log_scale = heads.VidHead(t.shape[-1])(s)
            total += jnp.mean(losses.vid(mean, t, log_scale=log_scale))
        return total


class MaskedGeneration(nn.Module):
    """The last map, with channels masked, from which a generator restores the teacher's."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The loss of the generated map."""
        (s,), (t,) = student.features, teacher.features
        if s.shape[-1] != t.shape[-1]:
            s = nn.Conv(t.shape[-1], (1, 1))(s)
        masked = losses.mask_channels(self.make_rng("dropout"), s, fraction=0.15)
        return jnp.mean(losses.mgd(heads.Generator(t.shape[-1])(masked), t))


class OrthogonalProjections(nn.Module):
    """The student's embedding, projected orthogonally to the width of the teacher's."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The loss of the projected embedding."""
        (s,), (t,) = student.features, teacher.features
        return jnp.mean(losses.vkd(heads.OrthogonalProjection(t.shape[-1])(s), t))


class Congruence(nn.Module):
    """The student's embedding, mapped linearly to the width of the teacher's.

    RepDistiller embeds both in 128 dimensions and trains both maps; two trained maps may meet at zero.
    """

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The loss of the mapped embedding."""
        (s,), (t,) = student.features, teacher.features
        return losses.correlation_congruence(nn.Dense(t.shape[-1])(s), t, axis_name=AXIS)


class InfoNce(nn.Module):
    """The student's embedding, projected to the width of the teacher's."""

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The loss of the projected embedding."""
        (s,), (t,) = student.features, teacher.features
        return losses.info_nce(heads.Embedding(t.shape[-1])(s), t, axis_name=AXIS)


class ContrastiveMemory(nn.Module):
    """CRD: both embeddings projected by trained layers, and a memory of every training example.

    Attributes:
      labels: of the training examples in the order of ``batch["position"]``; negatives are of other classes.
      dims: of the projections.
      negatives: per example; at most a third of the training examples, the share they are of CIFAR-100's.
    """

    labels: np.ndarray
    dims: int = 128
    negatives: int = 16384

    @nn.compact
    def __call__(self, student: View, teacher: View, batch: Batch, *, train: bool) -> Array:
        """The loss; in training mode the memory moves."""
        (s,), (t,) = student.features, teacher.features
        examples = len(self.labels)
        memory = self.variable(
            "memory",
            "crd",
            lambda: losses.init_crd_memory(self.make_rng("params"), examples=examples, dims=self.dims),
        )
        key = jax.random.fold_in(self.make_rng("dropout"), jax.lax.axis_index(AXIS))
        candidates = losses.crd_candidates(
            key,
            batch["position"],
            negatives=max(min(self.negatives, examples // 3), 1),
            examples=examples,
            labels=jnp.asarray(self.labels, jnp.int32),
        )
        loss, moved = losses.crd(
            heads.Embedding(self.dims, name="student")(s),
            heads.Embedding(self.dims, name="teacher")(jax.lax.stop_gradient(t)),
            memory.value,
            candidates,
            axis_name=AXIS,
        )
        if train and not self.is_initializing():
            memory.value = moved
        return jnp.mean(loss)
