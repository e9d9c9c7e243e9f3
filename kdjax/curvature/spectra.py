"""Stochastic estimates of a whole spectrum: its density, and its trace with a standard error."""

import functools
from typing import NamedTuple

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
    """A spectral density, and the quadrature behind it."""

    grid: Float[Array, " points"]
    """Eigenvalues."""

    mean: Float[Array, " points"]
    """Density at the grid points, mean over the probes; its integral is 1."""

    spread: Float[Array, " points"]
    """Standard deviation over the probes (n − 1); NaN for one probe."""

    nodes: Float[Array, "probes k"]
    """Quadrature nodes of each probe, ascending; after a breakdown the largest is repeated, with weight 0."""

    weights: Float[Array, "probes k"]
    """Weights, summing to 1 per probe: ``sum(weights * f(nodes))`` estimates the mean of f over the spectrum."""

    width: Float[Array, ""]
    """Standard deviation of the Gaussian on every node."""


class Trace(NamedTuple):
    """An estimate with its standard error over the probes."""

    estimate: Float[Array, ""]
    standard_error: Float[Array, ""]


def spectral_density(
    matvec: Matvec,
    like: PyTree,
    key: Array,
    *,
    num_matvecs: int = 60,
    num_probes: int = 8,
    loop: Loop | None = None,
) -> Density:
    r"""Density of the eigenvalues of a symmetric matrix by stochastic Lanczos quadrature.

    Lanczos' method from a random start gives a Gauss quadrature of the spectrum weighted by the start; the mean over
    starts weights all eigenvalues equally. Steps resolve the edges (20 suffice) and the shares of positive and negative
    mass (80, for 2 %), probes reduce the noise. For any number of steps the first two moments are those of the probes:
    ``n * sum(weights * nodes)`` is v'Hv for a start of length √n, an estimate of the trace, and with squared nodes one
    of the trace of H².

    The density is drawn with a Gaussian on every node, whose σ is the range of the nodes over ``num_matvecs``, the
    resolution of that many steps, on 1024 points that reach 5 σ beyond the nodes. Use :func:`smoothed` for others.

    Args:
      matvec: as for :func:`lanczos`.
      like: arrays with the structure of the vectors, such as the parameters.
      key: for the probes. They are standard normal: random signs, better for a trace, may be orthogonal to an
        eigenvector with few entries.
      num_matvecs: steps per probe.
      num_probes: independent starts, computed one after another in the memory of one.
      loop: as for :func:`lanczos`.

    Returns:
      The density with its nodes, weights and width.

    Raises:
      ValueError: as :func:`lanczos`, or if there are no probes.

    References:
      Ubaru, Chen, Saad, `Fast estimation of tr(f(A)) via stochastic Lanczos quadrature
      <https://www-users.cse.umn.edu/~saad/PDF/ys-2016-04.pdf>`_, 2017. Ghorbani, Krishnan, Xiao, `An Investigation
      into Neural Net Optimization via Hessian Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019.
    """
    check_arrays("spectral_density", like)
    check_num_matvecs("spectral_density", num_matvecs, size_of(like))
    if num_probes < 1:
        raise ValueError(f"spectral_density needs at least one probe, got {num_probes}.")
    like = widen(like)
    if choose_loop(loop, matvec, like, key) == "compiled":
        alphas, betas = _probe_all(as_argument(matvec), like, key, num_matvecs, num_probes)
    else:
        starts = (random_like(k, like) for k in jax.random.split(key, num_probes))
        found = [tridiagonalise(matvec, start, num_matvecs, "host")[:2] for start in starts]
        alphas, betas = (np.stack(each) for each in zip(*found, strict=True))
    check_finite("spectral_density", alphas, betas)
    return _density(alphas, betas)


@jax.jit
def smoothed(
    nodes: Float[Array, "*probes k"],
    weights: Float[Array, "*probes k"],
    grid: Float[Array, " points"],
    *,
    width: float | Float[Array, ""],
) -> Float[Array, "*probes points"]:
    """The density of each probe on a grid: a Gaussian of the given width on every node."""

    def probe(nodes, weights):
        return jnp.exp(-0.5 * ((grid[:, None] - nodes[None]) / width) ** 2) @ weights

    return jnp.vectorize(probe, signature="(k),(k)->(g)")(nodes, weights) / (width * (2 * jnp.pi) ** 0.5)


def hutch_plus_plus(matvec: Matvec, like: PyTree, key: Array, *, num_matvecs: int) -> Trace:
    r"""Trace of a symmetric matrix: exact on the space of its large eigenvalues, Hutchinson's estimator elsewhere.

    Hutchinson's estimator is the mean of :math:`v^\top H v` over vectors of random signs. A third of the products finds
    the space, a third gives its trace, a third the rest. For a positive semi-definite matrix the error falls with the
    number of products m as 1/m, against 1/√m for Hutchinson's alone. An indefinite matrix has no such bound, but the
    estimate is unbiased and its standard error holds. Memory is m vectors.

    Args:
      matvec: as for :func:`lanczos`.
      like: arrays with the structure of the vectors.
      key: for the signs.
      num_matvecs: products in all, at least 6.

    Returns:
      The trace, and the standard error of the rest.

    Raises:
      ValueError: if there are fewer than six products, integers in ``like``, or a product is not finite (NaN while a
        function is being compiled).

    References:
      Meyer et al., `Hutch++: Optimal Stochastic Trace Estimation <https://arxiv.org/abs/2010.09649>`_, 2021,
      algorithm 1.
    """
    check_arrays("hutch_plus_plus", like)
    if num_matvecs < 6:
        raise ValueError(f"hutch_plus_plus needs at least 6 products, got {num_matvecs}.")
    sketch_key, rest_key = jax.random.split(key)
    third = num_matvecs // 3
    multiply = functools.partial(multiply_all, matvec, like=widen(like), loop=None)
    space = _orthonormal(multiply(_signs(sketch_key, like, third)), size_of(like))
    inside = _sum_of_inner(space, multiply(space))
    rest = _beside(space, _signs(rest_key, like, num_matvecs - 2 * third))
    found = _of_samples(inside, rest, multiply(rest))
    check_finite("hutch_plus_plus", found.estimate)
    return found


@functools.partial(jax.jit, static_argnums=(3, 4))
def _probe_all(matvec, like, key, num_matvecs, num_probes):
    def probe(key):
        found = lanczos(matvec, random_like(key, like), num_matvecs=num_matvecs, loop="compiled")
        return found.alphas, found.betas

    return jax.lax.map(probe, jax.random.split(key, num_probes))


@jax.jit
def _density(alphas, betas):
    nodes, weights = _quadrature(alphas, betas)
    sigma = _resolution(nodes)
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
    """The range over the steps; a thousandth of the eigenvalue over the steps if there is only one."""
    low, high = jnp.min(nodes), jnp.max(nodes)
    size = jnp.maximum(jnp.abs(low), jnp.abs(high))
    extent = jnp.maximum(high - low, 1e-3 * jnp.where(size == 0, 1, size))
    return extent / nodes.shape[-1]


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
    """Standard deviation over the leading axis (n − 1), without overflow or underflow of squares."""
    unit = power_of_two(jnp.max(jnp.abs(samples)))
    return unit * jnp.std(samples / unit, axis=0, ddof=1)


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)
