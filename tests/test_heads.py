"""Heads: every parameter receives a gradient from the head's loss, and the architectures are the papers'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.losses import features
from kdjax.models import heads

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 4, 3)), jnp.float32)
TEACHER = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 4, 6)), jnp.float32)


def student(params, images):
    """The smallest possible network: a pointwise layer with 5 channels."""
    return jax.nn.relu(images @ params["kernel"])


def train_mode(module, params, *inputs):
    outputs, _ = module.apply({"params": params}, *inputs, train=True, mutable=["batch_stats"])
    return outputs


def regressor(params, maps):
    return features.hint(train_mode(heads.Regressor(6), params, maps), TEACHER)


def connector(params, maps):
    module = heads.Regressor(6, activation=lambda x: x)
    return features.ofd(train_mode(module, params, maps), TEACHER, margin=jnp.full(6, -0.5))


def embedding(params, maps):
    ours = heads.Embedding(8).apply({"params": params["student"]}, maps)
    theirs = heads.Embedding(8).apply({"params": params["teacher"]}, TEACHER)
    scores = ours @ theirs.T / 0.07  # contrastive: the own teacher's embedding against the other examples'
    return -jnp.diagonal(jax.nn.log_softmax(scores))


def orthogonal(params, maps):
    projected = heads.OrthogonalProjection(6).apply({"params": params}, maps.mean((1, 2)))
    return features.vkd(projected, TEACHER.mean((1, 2)))


def vid_head(params, maps):
    mean, log_scale = heads.VidHead(6).apply({"params": params}, maps)
    return features.vid(mean, TEACHER, log_scale=log_scale)


def translator(params, maps):
    return features.factor_transfer(train_mode(heads.FactorTranslator(3), params, maps), TEACHER)


def paraphraser(params, maps):
    _, restored = heads.FactorParaphraser(3).apply({"params": params}, maps)
    return features.hint(restored, TEACHER[..., :5])


def generator(params, maps):
    masked = features.mask_channels(jax.random.key(0), maps, fraction=0.5)
    return features.mgd(heads.Generator(6).apply({"params": params}, masked), TEACHER)


def review(params, maps):
    deep = maps[:, ::2, ::2]
    deep, mixture = train_mode(heads.ReviewFusion(6, hidden=4), params["deep"], deep)
    shallow, _ = train_mode(heads.ReviewFusion(6, hidden=4), params["shallow"], maps, mixture)
    return features.reviewkd(shallow, TEACHER) + features.reviewkd(deep, TEACHER[:, ::2, ::2])


def variables_of(module, *inputs, **options):
    """As ``module.init``, with kernels from NumPy: compiling linen's initialisers takes longer than a test."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1])), jnp.float32)
        return (jnp.ones if name in ("scale", "var") else jnp.zeros)(leaf.shape)

    shapes = jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), *inputs)
    return jax.tree.map_with_path(fill, shapes)


def init(module, *inputs, **options):
    return variables_of(module, *inputs, **options)["params"]


MAPS = jnp.ones((1, 4, 4, 5))
OBJECTIVES = {
    "regressor": (regressor, lambda: init(heads.Regressor(6), MAPS, train=False)),
    "connector": (connector, lambda: init(heads.Regressor(6), MAPS, train=False)),
    "embedding": (
        embedding,
        lambda: {
            "student": init(heads.Embedding(8), MAPS),
            "teacher": init(heads.Embedding(8), TEACHER),
        },
    ),
    "orthogonal": (orthogonal, lambda: init(heads.OrthogonalProjection(6), jnp.ones((1, 5)))),
    "vid_head": (vid_head, lambda: init(heads.VidHead(6), MAPS)),
    "translator": (translator, lambda: init(heads.FactorTranslator(3), MAPS, train=False)),
    "paraphraser": (paraphraser, lambda: init(heads.FactorParaphraser(3), MAPS)),
    "generator": (generator, lambda: init(heads.Generator(6), MAPS)),
    "review": (
        review,
        lambda: {
            "deep": init(heads.ReviewFusion(6, hidden=4), MAPS, train=False),
            "shallow": init(heads.ReviewFusion(6, hidden=4), MAPS, MAPS[..., :4], train=False),
        },
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_receives_a_gradient(name):
    loss, start = OBJECTIVES[name]
    kernel = np.random.default_rng(2).normal(size=(3, 5)).astype(np.float32)
    params = {"student": {"kernel": jnp.asarray(kernel)}, "head": start()}

    @jax.jit
    def gradients(params):
        return jax.grad(lambda p: jnp.mean(loss(p["head"], student(p["student"], IMAGES))))(params)

    for path, leaf in jax.tree.leaves_with_path(gradients(params)):
        assert np.isfinite(leaf).all(), jax.tree_util.keystr(path)
        # A leaf that is only rounding away from zero is one that the loss does not train.
        assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("width", [3, 6, 9])
def test_an_orthogonal_projection_keeps_what_fits(width):
    module = heads.OrthogonalProjection(6)
    kernel = np.random.default_rng(3).normal(size=(width, 6)).astype(np.float32)
    matrix = module.apply({"params": {"kernel": kernel}}, jnp.eye(width))
    gram = matrix @ matrix.T if width < 6 else matrix.T @ matrix
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)
    # Its span is the kernel's, and an orthonormal kernel is the matrix itself.
    long, basis = (x.T if width < 6 else x for x in (kernel, np.asarray(matrix)))
    np.testing.assert_allclose(basis @ (basis.T @ long), long, atol=1e-5)
    again = module.apply({"params": {"kernel": matrix}}, jnp.eye(width))
    np.testing.assert_allclose(again, matrix, atol=1e-6)


def test_embeddings_have_unit_length_and_a_zero_row_stays_zero():
    module = heads.Embedding(8, dtype=jnp.bfloat16)
    params = init(module, MAPS)
    y = module.apply({"params": params}, jnp.concatenate([MAPS, 0 * MAPS]))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(jnp.sum(y**2, axis=-1), [1, 0], atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(module.apply({"params": params}, x)))(0 * MAPS)
    np.testing.assert_array_equal(gradient, 0)


def test_vid_head_has_three_convolutions_without_bias_and_starts_at_a_variance_of_five():
    params = heads.VidHead(6).init(jax.random.key(0), MAPS)["params"]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(params))
    assert shapes == [(1, 1, 5, 6), (1, 1, 6, 6), (1, 1, 6, 6), (6,)]
    np.testing.assert_allclose(jax.nn.softplus(params["log_scale"]) + 1e-5, 5, rtol=1e-6)


def test_paraphraser_keeps_size_and_returns_factors_and_reconstruction():
    factors, restored = jax.eval_shape(
        lambda key, x: heads.FactorParaphraser(3).init_with_output(key, x)[0], jax.random.key(0), MAPS
    )
    assert (factors.shape, restored.shape) == ((1, 4, 4, 3), MAPS.shape)


def test_review_fusion_weighs_the_enlarged_mixture_by_position():
    module = heads.ReviewFusion(6, hidden=4)
    deeper = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, 2, 4)), jnp.float32)
    variables = variables_of(module, MAPS, deeper, train=False)
    params = variables["params"]
    # With the attention's kernel at zero and its biases far out, one map passes and the other does not.
    params["attention"] = {"kernel": 0 * params["attention"]["kernel"], "bias": jnp.array([-100.0, 100.0])}
    _, mixture = jax.jit(functools.partial(module.apply, train=False))(variables, MAPS, deeper)
    np.testing.assert_allclose(mixture, deeper.repeat(2, axis=1).repeat(2, axis=2), rtol=1e-6)


@pytest.mark.parametrize(
    "module", [heads.Regressor(6), heads.FactorTranslator(6), heads.ReviewFusion(6, hidden=4)]
)
def test_training_updates_the_statistics_and_evaluation_does_not(module):
    variables = variables_of(module, MAPS, train=False)
    apply = jax.jit(functools.partial(module.apply, mutable=["batch_stats"]), static_argnames="train")
    x = jnp.asarray(np.random.default_rng(0).normal(size=MAPS.shape), jnp.float32)
    _, updated = apply(variables, x, train=True)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), variables["batch_stats"], updated["batch_stats"])
    assert all(jax.tree.leaves(moved))
    _, same = apply(variables, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], same["batch_stats"])
