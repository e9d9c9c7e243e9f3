"""What random probes tell of a whole spectrum: its density, and its trace with a standard error."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from kdjax.curvature.krylov import check_num_matvecs, lanczos, ritz, tridiagonalise
from kdjax.curvature.vectors import (
    Loop,
    Matvec,
    as_argument,
    check_arrays,
    check_finite,
    choose_loop,
    cut,
    flatten,
    inner,
    join,
    multiply_all,
    power_of_two,
    random_like,
    size_of,
    widen,
)

_PADDING = 5  # widths of the kernel beyond the outermost node: less than 1e-6 of the mass lies outside


class Density(NamedTuple):
    """A spectral density, and the quadrature that it is drawn from."""

    grid: Float[Array, " points"]
    """Eigenvalues."""

    mean: Float[Array, " points"]
    """Density there, mean over the probes; its integral is 1."""

    spread: Float[Array, " points"]
    """Standard deviation over the probes (n − 1); NaN for one probe."""

    nodes: Float[Array, "probes k"]
    """Quadrature nodes of each probe, ascending; behind a breakdown the largest is repeated, with weight 0."""

    weights: Float[Array, "probes k"]
    """Weights, of sum 1 per probe: the mean of f over the spectrum is about ``sum(weights * f(nodes))``."""

    width: Float[Array, ""]
    """Standard deviation of the Gaussian put on every node."""


class Trace(NamedTuple):
    """An estimate with the standard error of its probes."""

    estimate: Float[Array, ""]
    standard_error: Float[Array, ""]


def spectral_density(
    matvec: Matvec,
    like: PyTree,
    key: Array,
    *,
    num_matvecs: int = 60,
    num_probes: int = 8,
    width: float | None = None,
    grid: Float[Array, " points"] | None = None,
    reorthogonalise: bool = True,
    loop: Loop | None = None,
) -> Density:
    r"""Density of the eigenvalues of a symmetric matrix by stochastic Lanczos quadrature.

    Lanczos' method from a random start gives a Gauss quadrature of the spectrum weighted by the start; the mean over
    starts weighs all eigenvalues equally. Steps resolve the edges (20 suffice) and the shares of positive and negative
    mass (80, for 2 %), probes reduce the noise. For every number of steps the first two moments are those of the
    probes alone: ``n * sum(weights * nodes)`` is v'Hv for a start of length √n, an estimate of the trace, and with
    squared nodes one of that of H².

    The density of one layer is that of an operator with ``only="Dense_0"`` and ``like=select(params, "Dense_0")``.

    Args:
      matvec: as for :func:`lanczos`.
      like: arrays of the structure of the vectors, such as the parameters.
      key: of the probes, which are standard normal: signs, better for a trace, may have no part at all along an
        eigenvector of few entries.
      num_matvecs: steps per probe.
      num_probes: independent starts, one after another, in the memory of one.
      width: σ of the Gaussian kernel in units of eigenvalues. By default the range of the nodes over ``num_matvecs``,
        which is what so many steps resolve; a smaller one draws spikes where the nodes happen to lie.
      grid: where to tell the density; by default 1024 points that reach 5 σ beyond the nodes.
      reorthogonalise: as for :func:`lanczos`. Ghosts share the weight of what they copy, so the density stays close.
      loop: as for :func:`lanczos`.

    Returns:
      The density with its nodes, weights and width. It is not scaled to have integral 1 on the grid: where it has not,
      mass lies outside the grid, or between its points.

    Raises:
      ValueError: as :func:`lanczos`, or if there are no probes or the width is not positive.

    References:
      Ubaru, Chen, Saad, `Fast estimation of tr(f(A)) via stochastic Lanczos quadrature
      <https://www-users.cse.umn.edu/~saad/PDF/ys-2016-04.pdf>`_, 2017. Ghorbani, Krishnan, Xiao, `An Investigation
      into Neural Net Optimization via Hessian Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019.
    """
    check_arrays("spectral_density", like)
    check_num_matvecs("spectral_density", num_matvecs, size_of(like))
    if num_probes < 1 or (isinstance(width, (int, float)) and not width > 0):
        raise ValueError(
            f"spectral_density needs at least one probe and a width above 0, got {num_probes} and {width}."
        )
    like = widen(like)
    if choose_loop(loop, matvec, like, key) == "compiled":
        alphas, betas = _probe_all(as_argument(matvec), like, key, num_matvecs, num_probes, reorthogonalise)
    else:
        starts = (random_like(k, like) for k in jax.random.split(key, num_probes))
        found = [tridiagonalise(matvec, start, num_matvecs, reorthogonalise, "host")[:2] for start in starts]
        alphas, betas = (np.stack(each) for each in zip(*found, strict=True))
    check_finite("spectral_density", alphas, betas)
    return _density(alphas, betas, grid, width)


@jax.jit
def smoothed(
    nodes: Float[Array, "*probes k"],
    weights: Float[Array, "*probes k"],
    grid: Float[Array, " points"],
    *,
    width: float | Float[Array, ""],
) -> Float[Array, "*probes points"]:
    """A Gaussian of the given width on every node: the density of each probe on a grid."""

    def probe(nodes, weights):
        return jnp.exp(-0.5 * ((grid[:, None] - nodes[None]) / width) ** 2) @ weights

    return jnp.vectorize(probe, signature="(k),(k)->(g)")(nodes, weights) / (width * (2 * jnp.pi) ** 0.5)


def hutchinson(
    matvec: Matvec, like: PyTree, key: Array, *, num_matvecs: int, loop: Loop | None = None
) -> Trace:
    r"""Trace of a symmetric matrix: the mean of :math:`v^\top H v` over vectors of random signs.

    Its variance is twice the squares of all entries off the diagonal, over the number of products. So it is exact, and
    proves nothing, for a diagonal matrix.

    Args:
      matvec: as for :func:`lanczos`.
      like: arrays of the structure of the vectors.
      key: of the signs.
      num_matvecs: vectors, at least 2.
      loop: as for :func:`lanczos`.

    Returns:
      The trace and its standard error.

    Raises:
      ValueError: if there are fewer than two vectors, integers in ``like``, or a product is not finite (NaN while a
        function is being compiled).

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines, 1990.
    """
    _check_samples("hutchinson", like, num_matvecs, 2)
    signs = _signs(key, like, num_matvecs)
    return _estimate("hutchinson", 0.0, signs, multiply_all(matvec, signs, widen(like), loop))


def hutch_plus_plus(
    matvec: Matvec, like: PyTree, key: Array, *, num_matvecs: int, loop: Loop | None = None
) -> Trace:
    """Trace of a symmetric matrix, exactly on the space of its large eigenvalues and by :func:`hutchinson` beside it.

    A third of the products finds the space, a third its trace, a third the rest. The error falls with the number of
    products m as 1/m where that of Hutchinson falls as 1/√m, for a positive semi-definite matrix; an indefinite one
    has no such bound, but the estimate is unbiased and its standard error honest. Memory is m vectors.

    Args:
      matvec: as for :func:`lanczos`.
      like: arrays of the structure of the vectors.
      key: of the signs.
      num_matvecs: products in all, at least 6.
      loop: as for :func:`lanczos`.

    Returns:
      The trace and its standard error, that of the rest.

    Raises:
      ValueError: as :func:`hutchinson`, with fewer than six products.

    References:
      Meyer et al., `Hutch++: Optimal Stochastic Trace Estimation <https://arxiv.org/abs/2010.09649>`_, 2021,
      algorithm 1.
    """
    _check_samples("hutch_plus_plus", like, num_matvecs, 6)
    sketch_key, rest_key = jax.random.split(key)
    third = num_matvecs // 3
    multiply = functools.partial(multiply_all, matvec, like=widen(like), loop=loop)
    space = _orthonormal(multiply(_signs(sketch_key, like, third)), size_of(like))
    inside = _sum_of_inner(space, multiply(space))
    rest = _beside(space, _signs(rest_key, like, num_matvecs - 2 * third))
    return _estimate("hutch_plus_plus", inside, rest, multiply(rest))


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _probe_all(matvec, like, key, num_matvecs, num_probes, reorthogonalise):
    def probe(key):
        options: dict[str, Any] = {"num_matvecs": num_matvecs, "reorthogonalise": reorthogonalise}
        found = lanczos(matvec, random_like(key, like), loop="compiled", **options)
        return found.alphas, found.betas

    return jax.lax.map(probe, jax.random.split(key, num_probes))


@jax.jit
def _density(alphas, betas, grid, width):
    nodes, weights = _quadrature(alphas, betas)
    sigma = _resolution(nodes) if width is None else jnp.asarray(width, nodes.dtype)
    if grid is None:
        grid = jnp.linspace(nodes.min() - _PADDING * sigma, nodes.max() + _PADDING * sigma, 1024)
    each = smoothed(nodes, weights, grid, width=sigma)
    spread = _deviation(each) if len(each) > 1 else jnp.full_like(each[0], jnp.nan)
    return Density(grid, jnp.mean(each, axis=0), spread, nodes, weights, sigma)


@jax.vmap
def _quadrature(alphas, betas):
    values, vectors, reached = ritz(alphas, betas)
    there = jnp.arange(len(values)) < reached
    return jnp.where(there, values, values[reached - 1]), jnp.where(there, vectors[0] ** 2, 0)


def _resolution(nodes: Array) -> Array:
    """Range over steps; something small beside the eigenvalue where there is only one."""
    low, high = jnp.min(nodes), jnp.max(nodes)
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    extent = jnp.maximum(high - low, 1e-3 * jnp.where(size == 0, 1, size))
    return extent / nodes.shape[-1]


def _check_samples(what: str, like: PyTree, num_matvecs: int, fewest: int) -> None:
    check_arrays(what, like)
    if num_matvecs < fewest:
        raise ValueError(f"{what} needs at least {fewest} products for a standard error, got {num_matvecs}.")


def _estimate(what: str, base: Any, vectors: Array, products: Array) -> Trace:
    found = _of_samples(base, vectors, products)
    check_finite(what, found.estimate)
    return found


@jax.jit
def _of_samples(base, vectors, products):
    samples = _inner_each(vectors, products)
    return Trace(base + jnp.mean(samples), _deviation(samples) / len(samples) ** 0.5)


@functools.partial(jax.jit, static_argnums=2)
def _signs(key, like, count):
    keys = jax.random.split(key, count)
    return jax.vmap(lambda k: cut(flatten(random_like(k, like, distribution="signs"))))(keys)


@functools.partial(jax.jit, static_argnums=1)
def _orthonormal(vectors, size):
    flat = join(vectors, size) / power_of_two(jnp.max(jnp.abs(vectors)))
    return jax.vmap(cut)(jnp.linalg.qr(flat.T)[0].T)


@jax.jit
def _beside(space, vectors):
    shares = jnp.sum(_einsum("mrw,krw->rmk", vectors, space), axis=0)
    return vectors - _einsum("mk,krw->mrw", shares, space)


@jax.jit
def _sum_of_inner(a, b):
    return jnp.sum(_inner_each(a, b))


_inner_each = jax.vmap(inner)


def _deviation(samples: Array) -> Array:
    """Standard deviation over the leading axis (n − 1), whose squares neither overflow nor vanish."""
    unit = power_of_two(jnp.max(jnp.abs(samples)))
    return unit * jnp.std(samples / unit, axis=0, ddof=1)


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
