"""Lanczos' method: extreme eigenpairs with error bounds from a few dozen products."""

import functools
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from kdjax.curvature.vectors import (
    Loop,
    Matvec,
    as_argument,
    check_arrays,
    check_finite,
    choose_loop,
    cut,
    exponent_of,
    flatten,
    inner,
    is_known,
    join,
    multiply,
    multiply_all,
    multiply_here,
    norm,
    power_of_two,
    size_of,
    unflatten,
    widen,
)

# In units of rounding of the largest |alpha| + beta so far: a smaller remainder of a step counts as zero.
_ROUNDING = 8
_ROWS = 16  # of a block of the basis


class Tridiagonal(NamedTuple):
    """Result of :func:`lanczos`: the matrix projected on the Krylov space of the start."""

    alphas: Float[Array, " k"]
    """Diagonal; zero from a breakdown on."""

    betas: Float[Array, " k"]
    """Off-diagonal. The last one couples to the next vector; zero from a breakdown on."""

    basis: Float[Array, "k n"]
    """Orthonormal rows, each in the order of ``ravel_pytree(start)``; zero after a breakdown."""

    rounding: Float[Array, ""]
    """Bound on the distance between a Ritz value and v'Hv; see :func:`extreme_eigenpairs`."""


Blocks: TypeAlias = tuple[Float[Array, "rows _ width"], ...]
"""A basis of cut vectors in separate arrays, so that a product with the first few reads no others."""


class Eigenpairs(NamedTuple):
    """Some eigenpairs with error bounds."""

    values: Float[Array, " m"]
    vectors: PyTree
    """Unit vectors like the start, with a leading axis of length m."""

    residuals: Float[Array, " m"]
    """Distance within which a true eigenvalue lies: ‖Hv − λv‖ from the recurrence, plus the rounding."""

    rounding: Float[Array, " m"]
    """Bound on the distance between λ and v'Hv, which are equal in exact arithmetic."""

    @property
    def negative(self) -> Array:
        """Where v'Hv < 0 beyond rounding, which proves a negative eigenvalue; see :func:`extreme_eigenpairs`."""
        return self.values + self.rounding < 0


class Extremes(NamedTuple):
    """What :func:`extreme_eigenpairs` finds."""

    top: Eigenpairs
    """Largest first."""

    bottom: Eigenpairs
    """Smallest, that is most negative, first."""


def lanczos(
    matvec: Matvec,
    start: PyTree,
    *,
    num_matvecs: int,
    loop: Loop | None = None,
) -> Tridiagonal:
    """Tridiagonalises a symmetric matrix on the Krylov space of a vector.

    In floating-point arithmetic the three-term recurrence loses orthogonality and finds outliers repeatedly (ghosts).
    One sweep of Gram-Schmidt over all earlier vectors after each step keeps them orthogonal to 5e-6 in float32, for any
    number of parameters, as long as a step leaves more than the sweep removes. Where it does not, only rounding is
    left: the Krylov space is exhausted (a breakdown; all values are then exact) and the rest is zero.

    The matrix may have any scale that its products can represent. A power of two, chosen by the first product, scales
    it to about 1, half before a product and half after, and is undone at the end, without rounding.

    Args:
      matvec: the product with the matrix, such as :func:`kdjax.curvature.hessian` makes, or any function of a pytree,
        for each of which the compiled loop is compiled again.
      start: pytree of floating-point arrays, of any length.
      num_matvecs: steps k; memory is as many vectors.
      loop: "compiled" runs all steps in one program, "host" each step in its own. The default is compiled, except on a
        CPU unless the convolutions are those of :mod:`kdjax.models`. There, XLA's fast form of other convolutions'
        gradients does not work inside loops, and its second thread slows down the small matrices of dense networks in
        one. On the host, ``matvec`` may be any function, even one that walks over a data set on disk; it is compiled if
        it is a pytree, such as an operator of this module or ``jax.tree_util.Partial(f)``.

    Returns:
      The tridiagonal matrix and the basis.

    Raises:
      ValueError: if the start is zero or holds integers, ``num_matvecs`` is not from 1 to the dimension, ``matvec``
        returns another structure, or a product is not finite. Inside a compiled function a zero start or a non-finite
        product makes NaN instead.

    References:
      Lanczos, An iteration method for the solution of the eigenvalue problem, 1950. Paige, Error analysis of the
      Lanczos algorithm for tridiagonalizing a symmetric matrix, 1976, for the loss of orthogonality.
    """
    alphas, betas, rounding, blocks = tridiagonalise(matvec, start, num_matvecs, loop)
    return Tridiagonal(alphas, betas, _joined(blocks, size_of(start)), rounding)


def tridiagonalise(
    matvec: Matvec, start: PyTree, num_matvecs: int, loop: Loop | None
) -> tuple[Float[Array, " k"], Float[Array, " k"], Float[Array, ""], Blocks]:
    """:func:`lanczos` with the basis in blocks, since joining them takes the memory of a second basis."""
    check_arrays("lanczos", start)
    check_num_matvecs("lanczos", num_matvecs, size_of(start))
    start = widen(start)
    length = _length(start)
    if is_known(length) and not 0 < length < np.inf:
        raise ValueError(
            f"lanczos needs a start of finite positive length, got {float(length):g}: draw another."
        )
    if choose_loop(loop, matvec, start) == "compiled":
        blocks, state = _in_one_program(as_argument(matvec), start, num_matvecs)
    else:
        blocks, state = _begin(start, num_matvecs)
        for step in range(num_matvecs):
            product = multiply_here(matvec, state.current, start, _before(state.exponent))
            state = _advance(blocks, state, np.int32(step), product)
            block, place = divmod(step + 1, _ROWS)
            if step + 1 < num_matvecs:
                stored = _store(blocks[block], np.int32(place), state.current)
                blocks = (*blocks[:block], stored, *blocks[block + 1 :])
    check_finite("lanczos", state.alphas, state.betas)
    return *_finished(state), blocks


def extreme_eigenpairs(
    matvec: Matvec,
    start: PyTree,
    *,
    num_matvecs: int,
    top: int = 1,
    bottom: int = 1,
    explicit_residuals: bool = False,
    loop: Loop | None = None,
) -> Extremes:
    r"""The largest and the smallest (most negative) eigenvalues with their vectors.

    A pair (θ, v) of residual r has a true eigenvalue within r of θ. That does not prove that θ is the extreme one: with
    too few products, or a start orthogonal to its vector, it may be missed. 16 to 20 products find the extremes of a
    network's Hessian at a saddle, and up to 50 late in training, when λ_min is a hundredth of λ_max; a random start
    needs about ln(n) √(λ_max / gap).

    **What** ``negative`` **proves.** In exact arithmetic θ = v'Hv, converged or not, and no unit vector has v'Hv below
    the smallest eigenvalue. So θ < 0 proves negative curvature, up to rounding. ``rounding`` bounds that by the sum of
    two parts. The first is measured: with an orthonormal basis Q, what a Gram-Schmidt sweep removes from a step is the
    column of Q'HQ that the tridiagonal matrix lacks, so the root of the sum of squares bounds the change of any Ritz
    value. It also detects matrices that are not symmetric. The second is 8 √k units of rounding (machine epsilon) of
    the largest |α| + β, for k steps that each round their vectors and their product; in float32 that is 5e-6 λ_max for
    30 steps, and smaller curvature cannot be distinguished from zero. It assumes products accurate to a few units of
    rounding of λ_max. This holds for networks in float32, not in bfloat16 or with dropout, which no bound from the
    products alone could detect.

    Args:
      matvec: as for :func:`lanczos`.
      start: as for :func:`lanczos`, usually from :func:`random_like`.
      num_matvecs: steps of Lanczos' method; memory is as many vectors.
      top: how many of the largest.
      bottom: how many of the smallest.
      explicit_residuals: spend a product on each pair to measure its residual and v'Hv, instead of taking them from
        the recurrence. The difference in v'Hv is added to ``rounding``.
      loop: as for :func:`lanczos`.

    Returns:
      Both ends. A single start finds one copy of a repeated eigenvalue. Where the Krylov space is exhausted before
      enough pairs are found, the others are NaN.

    Raises:
      ValueError: as :func:`lanczos`, or if more pairs are asked for than there are steps.

    References:
      Parlett, The Symmetric Eigenvalue Problem, 1998: theorem 10.2.1 for v'Hv, 4.5.1 and section 13.2 for the residual.
      Paige, Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem, 1980, for rounding in
      the recurrence. Kuczyński, Woźniakowski, Estimating the largest eigenvalue by the power and Lanczos algorithms
      with a random start, 1992, for the number of products.
    """
    if not (0 <= top <= num_matvecs and 0 <= bottom <= num_matvecs):
        raise ValueError(
            f"extreme_eigenpairs finds up to num_matvecs = {num_matvecs} pairs at either end, got top = {top} and "
            f"bottom = {bottom}."
        )
    alphas, betas, rounding, blocks = tridiagonalise(matvec, start, num_matvecs, loop)
    ends = _pairs(alphas, betas, rounding, blocks, widen(start), top, bottom)
    if not explicit_residuals:
        return ends
    return Extremes(*(_measured(matvec, pairs, widen(start), loop) for pairs in ends))


def check_num_matvecs(what: str, num_matvecs: int, dimension: int) -> None:
    """Raises a ValueError unless the Krylov space fits into the parameters."""
    if not 1 <= num_matvecs <= dimension:
        raise ValueError(
            f"{what} needs num_matvecs from 1 to the number of parameters, which is {dimension}, got {num_matvecs}."
        )


def ritz(
    alphas: Float[Array, " k"], betas: Float[Array, " k"]
) -> tuple[Float[Array, " k"], Float[Array, "k k"], Array]:
    """Eigenvalues of the tridiagonal matrix in ascending order, eigenvectors as columns, and how many are valid.

    Places after a breakdown come last, with values above all others.
    """
    reached = jnp.concatenate([jnp.ones(1, bool), jnp.cumprod(betas[:-1] > 0) > 0])
    beside = jnp.where(reached[1:], betas[:-1], 0)
    bound = jnp.max(jnp.abs(alphas) + jnp.pad(beside, (0, 1)) + jnp.pad(beside, (1, 0)))  # Gershgorin
    unit = power_of_two(bound)  # the solver squares
    alphas, beside = jnp.where(reached, alphas / unit, 1 + 2 * bound / unit), beside / unit
    values, vectors = jnp.linalg.eigh(jnp.diag(alphas) + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    return values * unit, vectors, jnp.sum(reached)


class _State(NamedTuple):
    alphas: Array
    betas: Array
    current: Array
    previous: Array
    scale: Array  # largest |alpha| + beta so far
    defect: Array  # root of the sum of squares of what sweeps removed
    exponent: Array  # alphas, betas and products are scaled by 2 to minus this power


def _first(start: PyTree, num_matvecs: int) -> tuple[Blocks, _State]:
    vector = cut(flatten(start))
    unit = power_of_two(jnp.max(jnp.abs(vector)))
    vector = vector / unit
    vector = vector / norm(vector)
    zeros = jnp.zeros(num_matvecs, vector.dtype)
    # The first vector is scaled to entries of about 1, so that its products have the scale of the matrix.
    exponent = jnp.asarray(-2 * round(np.log2(size_of(start)) / 2), jnp.int32)
    state = _State(zeros, zeros, vector, jnp.zeros_like(vector), zeros[0], zeros[0], exponent)
    heights = [min(_ROWS, num_matvecs - row) for row in range(0, num_matvecs, _ROWS)]
    first, *others = (jnp.zeros((len(vector), height, vector.shape[1]), vector.dtype) for height in heights)
    return (first.at[:, 0].set(vector), *others), state


def _next(blocks: Blocks, state: _State, step: Any, product: Array) -> _State:
    w, exponent = _in_range(state, step, product)
    alpha = inner(w, state.current)
    w = w - alpha * state.current - jnp.where(step > 0, state.betas[step - 1], 0) * state.previous
    nothing = share = jnp.zeros_like(alpha)
    for i, block in enumerate(blocks):
        # Only blocks in use: for a small network, sweeping takes most of the time.
        w, part = jax.lax.cond(step >= i * _ROWS, _beside, lambda block, w: (w, nothing), block, w)
        share = jnp.hypot(share, part)
    beta = jnp.linalg.norm(w.ravel())
    scale = jnp.maximum(state.scale, jnp.abs(alpha) + beta)
    ends = beta <= jnp.maximum(share, _ROUNDING * jnp.finfo(w.dtype).eps * scale)
    beta = jnp.where(ends, 0, beta)
    following = jnp.where(ends, 0, w / jnp.where(ends, 1, beta))
    alphas, betas = state.alphas.at[step].set(alpha), state.betas.at[step].set(beta)
    defect = jnp.hypot(state.defect, share)
    return _State(alphas, betas, following, state.current, scale, defect, exponent)


def _in_range(state: _State, step: Any, product: Array) -> tuple[Array, Array]:
    """The product scaled to about 1, and the exponent of the scale, which the first product sets."""
    before = _exponent_before(state.exponent)
    exponent = jax.lax.cond(step == 0, lambda: exponent_of(jnp.max(jnp.abs(product))), lambda: state.exponent)
    return product * jnp.ldexp(jnp.ones((), product.dtype), -before - exponent), exponent


def _exponent_before(exponent: Array) -> Array:
    """Exponent of the factor applied before a product: half of the scale, so that intermediates stay in range."""
    return -exponent // 2


def _beside(block: Array, w: Array) -> tuple[Array, Array]:
    """A cut vector minus its components along the rows of a block, and the norm of these components."""
    shares = jnp.sum(_einsum("rkw,rw->rk", block, w), axis=0)
    return w - _combined(shares, block), jnp.linalg.norm(shares)


def _combined(shares: Array, block: Array) -> Array:
    """The sum of the rows of a block, each times its share."""
    # One product for each row of the cut vectors, which reads the block in memory order.
    return _einsum("rk,rkw->rw", jnp.broadcast_to(shares, (len(block), len(shares))), block)


def _unscaled(state: _State) -> tuple[Array, Array, Array]:
    """Alphas, betas and the rounding bound, in the scale of the matrix."""
    eps, steps = jnp.finfo(state.alphas.dtype).eps, len(state.alphas)
    rounding = state.defect + _ROUNDING * eps * steps**0.5 * state.scale
    scale = jnp.ldexp(jnp.ones_like(rounding), state.exponent)
    return state.alphas * scale, state.betas * scale, rounding * scale


def _with_row(blocks: Blocks, row: Any, vector: Array) -> Blocks:
    """The blocks with one row set; a row after the last is dropped."""
    places = (row - i * _ROWS for i in range(len(blocks)))
    return tuple(
        block.at[:, jnp.where(place < 0, block.shape[1], place)].set(vector, mode="drop")
        for block, place in zip(blocks, places, strict=True)
    )


@functools.partial(jax.jit, static_argnums=2)
def _in_one_program(matvec, start, num_matvecs):
    def step(i, carry):
        blocks, state = carry
        product = multiply(matvec, state.current, start, _exponent_before(state.exponent))
        state = _next(blocks, state, i, product)
        return _with_row(blocks, i + 1, state.current), state

    return jax.lax.fori_loop(0, num_matvecs, step, _first(start, num_matvecs))


_begin = jax.jit(_first, static_argnums=1)
_advance, _before, _finished = jax.jit(_next), jax.jit(_exponent_before), jax.jit(_unscaled)
# A program of its own that writes in place: one that also reads the basis would copy it.
_store = jax.jit(lambda block, place, vector: block.at[:, place].set(vector), donate_argnums=0)


@functools.partial(jax.jit, static_argnums=1)
def _joined(blocks, size):
    return jnp.concatenate([join(jnp.moveaxis(block, 1, 0), size) for block in blocks])


@functools.partial(jax.jit, static_argnums=(5, 6))
def _pairs(alphas, betas, rounding, blocks, start, top, bottom):
    values, vectors, reached = ritz(alphas, betas)

    def pairs(places):
        there = (places >= 0) & (places < reached)
        chosen = jnp.where(there, places, 0)

        def pair(place):
            parts = (vectors[i * _ROWS : (i + 1) * _ROWS, place] for i in range(len(blocks)))
            shares = zip(parts, blocks, strict=True)
            row = functools.reduce(jnp.add, (_combined(part, block) for part, block in shares))
            residual = betas[-1] * jnp.abs(vectors[-1, place]) + rounding
            return values[place], unflatten(start, join(row, size_of(start))), residual, rounding

        masked = jax.vmap(lambda known, x: jnp.where(known, x, jnp.nan))
        return Eigenpairs(*jax.tree.map(functools.partial(masked, there), jax.lax.map(pair, chosen)))

    return Extremes(pairs(reached - 1 - jnp.arange(top)), pairs(jnp.arange(bottom)))


def _measured(matvec: Matvec, pairs: Eigenpairs, start: PyTree, loop: Loop | None) -> Eigenpairs:
    if not len(pairs.values):
        return pairs
    vectors = _cut_each(pairs.vectors)
    return _compared(pairs, vectors, multiply_all(matvec, vectors, start, loop))


@jax.jit
@jax.vmap
def _compared(pair, vector, product):
    unit = power_of_two(jnp.max(jnp.abs(product)))
    away = jnp.abs(pair.values - unit * inner(vector, product / unit))
    residual = norm(product - pair.values * vector) + pair.rounding
    return pair._replace(residuals=residual, rounding=pair.rounding + away)


def _einsum(subscripts: str, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=jax.lax.Precision.HIGHEST)


_cut_each = jax.jit(jax.vmap(lambda vector: cut(flatten(vector))))
_length = jax.jit(lambda tree: norm(flatten(tree)))
