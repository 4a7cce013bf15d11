"""What the marginal velocity does to densities: change of variables, theorem 1, continuity.

Densities are the closed forms of `JointNormals`; velocities and solves are the library's.

Sources: Chen et al. 2018, arXiv 1806.07366 (change of variables); Lipman et al. 2022, arXiv
2210.02747 (theorem 1); Tong et al. 2023, arXiv 2302.00482 (the same for any coupling); Albergo et
al. 2023, arXiv 2303.08797 (bridges).
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import (
    PATHS,
    JointNormals,
    jit,
    optimal_covariance,
    quick_on,
    schroedinger_covariance,
)
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm

BRIDGES = {
    "brownian_0.5": fm.brownian_bridge(0.5),
    "trigonometric": fm.BridgePath(*fm.cosine(), lambda t: jnp.sqrt(2 * t * (1 - t))),
    "smooth": fm.BridgePath(*fm.polynomial(2), lambda t: jnp.sin(jnp.pi * t) ** 2),
}
BOTH = PATHS | BRIDGES
MEAN0, MEAN1 = np.random.default_rng(6).standard_normal((2, 3, 2))
COV0, COV1 = np.array([[0.5, 0.2], [0.2, 0.3]]), np.array([[0.2, -0.1], [-0.1, 0.6]])
ZERO = np.zeros((2, 2))
CROSS = {
    "independent": ZERO,
    "optimal map": optimal_covariance(COV0, COV1),
    "entropic": schroedinger_covariance(COV0, COV1, 0.8),
}
TIMES = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
TIGHT = diffrax.PIDController(rtol=1e-10, atol=1e-10)


def normals(name, coupling):
    return JointNormals(BOTH[name], MEAN0, MEAN1, COV0, COV1, CROSS[coupling])


def points_of(pairs, t, seed=1):
    """x_t of a few pairs of their own: where p_t is not small."""
    x0, x1 = (jnp.asarray(x) for x in pairs.sample_pairs(np.random.default_rng(seed), len(t)))
    if isinstance(pairs.path, fm.BridgePath):
        return fm.sample_bridge(jax.random.key(seed), pairs.path, x0, x1, jnp.asarray(t)).mean.x_t
    return fm.sample_path(pairs.path, x0, x1, jnp.asarray(t)).x_t


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cond_ot_0.1", "vp", "brownian_0.5"])
def test_change_of_variables_along_a_solve(name, x64):
    """p_t(x) = p_s(phi^-1(x)) |det d phi^-1 / dx|: solve, Jacobian of the solve, and log_prob.

    From s = 0, and from s = 0.1 where the flow of a bridge has no beginning.
    """
    pairs = normals(name, "entropic")
    s = 0.1 if name in BRIDGES else 0.0
    times = np.array([0.25, 0.5, 0.75, 1.0 if name == "cond_ot_0.1" else 0.95])
    options = {"t0": s, "stepsize_controller": TIGHT}

    @jit
    def three(t, x):
        def back(x):
            solved = {"t0": t, "t1": s, "adjoint": diffrax.ForwardMode()}
            return fm.sample(pairs.velocity, x[None], stepsize_controller=TIGHT, **solved)[0]

        def source(x):
            return pairs.log_prob(jnp.asarray(s), x)

        log_det = jnp.linalg.slogdet(jax.jacfwd(back)(x))[1]
        by_jacobian = source(back(x)[None])[0] + log_det
        by_trace = fm.log_prob(pairs.velocity, x[None], t1=t, source_log_prob=source, **options)[0]
        return by_jacobian, by_trace, pairs.log_prob(t, x[None])[0]

    with jax.numpy_dtype_promotion("standard"):  # Diffrax relies on it
        got = np.array([three(t, x) for t, x in zip(times, points_of(pairs, times), strict=True)])
    np.testing.assert_allclose(got[:, 0], got[:, 2], atol=1e-8)
    np.testing.assert_allclose(got[:, 1], got[:, 2], atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", PATHS)
def test_theorem_1_the_marginal_velocity_generates_the_marginals(name, x64):
    """On a finite data set, along every path: log-densities of the flow are those of x_t."""
    path, data = PATHS[name], MEAN1
    pairs = JointNormals(path, 0 * data, data, np.eye(2), ZERO, ZERO)
    velocity = fm.marginal_velocity(path, jnp.asarray(data))

    def source(x):  # of vp it is no N(0, I) by alpha(0) = 0.0066
        return pairs.log_prob(jnp.zeros(()), x)

    @jit
    def log_probs(t, x):
        flow = fm.log_prob(velocity, x, t1=t, source_log_prob=source, stepsize_controller=TIGHT)
        return flow, pairs.log_prob(t, x)

    with jax.numpy_dtype_promotion("standard"):
        for t in (0.3, 0.6, 0.9):
            got, want = log_probs(jnp.asarray(t), points_of(pairs, np.full(8, t)))
            np.testing.assert_allclose(got, want, atol=1e-7)


def rms(x):
    return np.sqrt(np.mean(x**2, axis=-1))


def residuals(pairs, h, t, x, values):
    """d/dt p / p and div(p u) / p, `[2, batch]`, by differences of second and of fourth order."""
    dim = x.shape[1]
    steps = h * np.array([-2, -1, 0, 1, 2])[:, None, None, None] * np.eye(dim + 1)[None, :, None]
    at = np.concatenate([t[:, None], x], 1)[None, None] + steps
    p, u = values(pairs[1:], *(jnp.asarray(a) for a in np.split(at.reshape(-1, dim + 1), [1], 1)))
    moved = np.concatenate([p[:, None], p[:, None] * u], 1).reshape(*at.shape)
    # Of each direction its own component: p in t, p u_i in x_i.
    far_left, left, _, right, far_right = np.einsum("sdbd->sdb", moved)
    second, wide = (right - left) / (2 * h), (far_right - far_left) / (4 * h)
    terms = np.stack([second, (4 * second - wide) / 3]) / moved[2, 0, :, 0]
    return np.stack([terms[:, 0], terms[:, 1:].sum(1)], 1)


@quick_on("brownian_0.5", names=tuple(BOTH))
def test_the_continuity_equation_of_every_path_bridge_and_coupling(name, x64):
    """With half the step a quarter of the residual is left, or a sixteenth; u is not 1.01 u.

    Between three normals each, with every coupling; of bridges between points too.
    """
    path = BOTH[name]
    cases = [normals(name, coupling) for coupling in CROSS]
    if name in BRIDGES:
        cases.append(JointNormals(path, MEAN0, MEAN1, ZERO, ZERO, ZERO))

    @jit  # once for all couplings
    def values(arrays, t, x):
        pairs = JointNormals(path, *arrays)
        return jnp.exp(pairs.log_prob(t[:, 0], x)), pairs.velocity(t[:, 0], x)

    for pairs in cases:
        x = np.asarray(points_of(pairs, TIMES))
        # [step, order, batch]
        slope, outflow = np.stack(
            [residuals(pairs, h, TIMES, x, values) for h in (2e-3, 1e-3, 5e-4)], axis=2
        ).swapaxes(0, 1)
        size = rms(slope + outflow)
        orders = np.log2(size[:, :-1] / size[:, 1:])
        np.testing.assert_allclose(orders[0], 2, atol=0.05)
        # Of the first two steps: the third's residual is near the rounding of p / h.
        np.testing.assert_allclose(orders[1, 0], 4, atol=0.1)
        assert size[1, -1] < 1e-5 and rms(slope + 1.01 * outflow).min() > 1e-3
