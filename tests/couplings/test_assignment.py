"""The assignment's cost against SciPy's and closed forms, on every road to the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from scipy.optimize import linear_sum_assignment

from fmjax.couplings import assignment
from fmjax.training import sharding


def costs():
    """Name -> a cost [n, n] in float32: plain, tied, duplicated, degenerate, of a wide range."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((40, 40))
    outlier = normal.copy()
    outlier[3, :] += 1e4
    outlier[:, 5] -= 1e4
    clusters = np.abs(normal)
    clusters[:20, 20:] += 1e8
    clusters[20:, :20] += 1e8
    found = {
        "one": normal[:1, :1],
        "two": normal[:2, :2],
        "normal": normal,
        "small": 1e-12 * normal,
        "large": 1e12 * normal,
        "tied": rng.integers(0, 3, (40, 40)),
        "duplicated": np.repeat(np.repeat(normal[:10, :10], 4, axis=0), 4, axis=1),
        "constant": np.full((7, 7), 3.0),
        "zero": np.zeros((7, 7)),
        "rank one": np.outer(normal[0], normal[1]),
        "outlier": outlier,
        "one far entry": np.where(np.arange(1600).reshape(40, 40) == 77, 1e9, normal),
        "clusters": clusters,
    }
    forbidden = np.abs(normal)
    forbidden[rng.random((40, 40)) < 0.5] = np.inf
    for last in (1e3, 1e6, 1e9, 1e30, np.inf):
        found[f"forbidden by {last:g}"] = np.where(np.isinf(forbidden), last, forbidden)
    return {name: np.asarray(cost, np.float32) for name, cost in found.items()}


def optimum(cost):
    """SciPy's cost of the numbers given, in float64."""
    exact = np.asarray(cost, np.float64)
    return exact[linear_sum_assignment(exact)].sum()


def got_cost(cost, rows):
    rows = np.asarray(rows)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(cost)))
    return np.asarray(cost, np.float64)[rows, np.arange(len(cost))].sum()


@pytest.mark.parametrize("name", costs())
def test_cost_is_the_optimum(name):
    cost = costs()[name]
    for solve in (assignment.optimal_assignment, jit(assignment.optimal_assignment)):
        np.testing.assert_allclose(got_cost(cost, solve(cost)), optimum(cost), rtol=1e-13)


@pytest.mark.parametrize("name", costs())
def test_on_the_device_it_is_the_optimum_to_rounding(name):
    """In float32 what differs by less than 1e-6 of the largest finite cost counts as equal."""
    cost = costs()[name]
    got = got_cost(cost, jit(assignment.solve_on_device)(jnp.asarray(cost)))
    rounding = 1e-6 * np.abs(cost[np.isfinite(cost)]).max() * len(cost)
    assert 0 <= got - optimum(cost) + 1e-12 * abs(got) and got - optimum(cost) <= rounding


def test_float64_costs_are_exact_under_x64():
    """Differences of 1e-12 of the largest decide."""
    rng = np.random.default_rng(0)
    cost = 1.0 + 1e-12 * rng.random((20, 20))
    with jax.enable_x64(True):
        rows = assignment.optimal_assignment(jnp.asarray(cost))
    np.testing.assert_allclose(got_cost(cost, rows), optimum(cost), rtol=1e-15)


def test_potentials_are_close_to_the_dual_optimum():
    """At the optimum the reduced cost of the best permutation is zero: a fifth of it is left."""
    cost = costs()["normal"].astype(np.float64)
    f, g = assignment.potentials(jnp.asarray(cost, jnp.float32))
    best = linear_sum_assignment(cost)
    reduced = cost - np.asarray(f, np.float64)[:, None] - np.asarray(g, np.float64)
    assert reduced.min() > -1e-5
    plain = cost - cost.min(1, keepdims=True)
    plain -= plain.min(0, keepdims=True)
    assert reduced[best].sum() < 0.2 * plain[best].sum()


@pytest.mark.parametrize("margin", [1e-3, 0.02, 10.0])
def test_bounds_are_measured_until_the_optimum_is_certain(margin):
    rng = np.random.default_rng(0)
    cost = rng.random((60, 60)) ** 3
    slack = 0.05 * rng.random((60, 60))  # bounds lie below by up to a twentieth
    measured = []

    def measure(rows, columns):
        measured.append(len(rows))
        return cost[rows, columns]

    pairs = assignment.solve_by_bounds(cost - slack, measure, margin)
    if margin == 10.0:  # everything would be measured
        assert pairs is None and not measured
    else:
        np.testing.assert_allclose(cost[pairs].sum(), optimum(cost), rtol=1e-13)
        assert 60 <= sum(measured) <= 1800


@pytest.mark.slow
def test_jit_eager_vmap_and_scan_agree():
    stack = jnp.asarray(np.random.default_rng(1).standard_normal((3, 9, 9)), jnp.float32)
    want = np.stack([assignment.optimal_assignment(cost) for cost in stack])
    np.testing.assert_array_equal(jit(jax.vmap(assignment.optimal_assignment))(stack), want)
    np.testing.assert_array_equal([jit(assignment.optimal_assignment)(c) for c in stack], want)
    scan = jit(lambda s: jax.lax.scan(lambda c, x: (c, assignment.optimal_assignment(x)), 0, s)[1])
    np.testing.assert_array_equal(scan(stack), want)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 2)])
def test_only_square_matrices(shape):
    with pytest.raises(ValueError, match="square"):
        assignment.optimal_assignment(jnp.zeros(shape))


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    """A callback that waits for the runtime's threads would stop here, with all devices busy."""
    whole = sharding.replicated(sharding.make_mesh())

    @jax.jit
    def on_mesh(cost):
        return jax.lax.with_sharding_constraint(assignment.optimal_assignment(cost), whole)

    rng = np.random.default_rng(2)
    for n in (16, 600):  # 600: 1.4 MB, more than is copied at once
        for _ in range(10):
            cost = rng.standard_normal((n, n)).astype(np.float32)
            rows = on_mesh(jax.device_put(cost, whole))
            want = linear_sum_assignment(cost.T)[1]
            assert len(rows.addressable_shards) == 8
            for shard in rows.addressable_shards:
                np.testing.assert_array_equal(shard.data, want)


@pytest.mark.parametrize("scale", [1e-30, 1e20, 3e37])
def test_costs_of_any_size(scale):
    cost = jnp.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]) * scale
    np.testing.assert_array_equal(jax.jit(assignment.optimal_assignment)(cost), [1, 0, 2])


def test_an_empty_matrix_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        assignment.optimal_assignment(jnp.zeros((0, 0)))


NAN, INF = float("nan"), float("inf")
BAD = {
    "NaN": ([[NAN, 1.0], [2.0, 0.0]], r"got nan at \[0, 0\], the first of 1"),
    "-infinity": ([[0.0, 1.0], [-INF, 0.0]], r"got -inf at \[1, 0\]"),
    "a row of infinities": ([[INF, INF], [2.0, 0.0]], "every permutation holds 1 or more"),
    "two rows for one column": ([[1.0, INF, INF]] * 2 + [[0.0] * 3], "every permutation holds 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_cost_without_an_optimum_is_refused(name):
    cost, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        assignment.optimal_assignment(cost)
    for solve in (assignment.optimal_assignment, assignment._on_device):
        # JAX raises one or the other, as the program runs here or in a thread.
        with pytest.raises((RuntimeError, ValueError), match="must hold no NaN and no -infinity"):
            jax.block_until_ready(jax.jit(solve)(jnp.array(cost)))


def test_only_floating_costs_and_lists_too():
    cost = [[INF, 1.0, 2.0], [1.0, INF, 2.0], [1.0, 2.0, INF]]
    for given in (cost, np.array(cost), np.array(cost, np.float32)):
        np.testing.assert_array_equal(assignment.optimal_assignment(given), [2, 0, 1])
    for given, got in (
        (np.eye(2, dtype=int), "int32"),
        (np.eye(2) > 0, "bool"),
        (1j * np.eye(2), "complex64"),
    ):
        with pytest.raises(ValueError, match=f"cost must be floating; got {got}"):
            assignment.optimal_assignment(given)
    with pytest.raises(ValueError, match="cost must be an array of numbers; got None"):
        assignment.optimal_assignment(None)
