"""The curvature of a loss: Hessian-vector products, and the spectrum estimated from a few of them.

::

    loss = curvature.evaluation_loss(apply_fn, objective)  # build once for all checkpoints
    multiply = curvature.hessian(loss, params, batch, model_state)
    start = curvature.random_like(jax.random.key(0), params)
    ends = curvature.extreme_eigenpairs(multiply, start, num_matvecs=30)
    ends.bottom.values[0], ends.bottom.negative[0]  # most negative curvature; is it certain?
    density = curvature.spectral_density(multiply, params, jax.random.key(1))

A matrix is a function that multiplies a vector, and a vector a pytree like the parameters, in float32 or wider.
:func:`hessian` and :func:`gauss_newton` make such functions; the other functions take any.

**Pitfalls.** A minibatch has negative curvature that the data set has not: use more examples, or measure the direction
found on one batch on another. Curvature scales with the loss and, under normalisation, with the weights, so compare
networks at the same training loss. In float32, curvature below 5e-6 of the largest eigenvalue cannot be distinguished
from rounding.
"""

from kdjax.curvature.krylov import Eigenpairs as Eigenpairs
from kdjax.curvature.krylov import Extremes as Extremes
from kdjax.curvature.krylov import Tridiagonal as Tridiagonal
from kdjax.curvature.krylov import extreme_eigenpairs as extreme_eigenpairs
from kdjax.curvature.krylov import lanczos as lanczos
from kdjax.curvature.operators import Operator as Operator
from kdjax.curvature.operators import evaluation_loss as evaluation_loss
from kdjax.curvature.operators import gauss_newton as gauss_newton
from kdjax.curvature.operators import hessian as hessian
from kdjax.curvature.operators import hvp as hvp
from kdjax.curvature.spectra import Density as Density
from kdjax.curvature.spectra import Trace as Trace
from kdjax.curvature.spectra import hutch_plus_plus as hutch_plus_plus
from kdjax.curvature.spectra import smoothed as smoothed
from kdjax.curvature.spectra import spectral_density as spectral_density
from kdjax.curvature.vectors import random_like as random_like
