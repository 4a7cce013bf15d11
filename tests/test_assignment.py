"""The assignment's cost against SciPy's and closed forms, on every road to the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from scipy.optimize import linear_sum_assignment

from fmjax import assignment, sharding


def costs():
    """Name -> a cost [n, n] in float32: plain, tied, duplicated, degenerate."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((40, 40))
    outlier = normal.copy()
    outlier[3, :] += 1e4
    outlier[:, 5] -= 1e4
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
    }
    return {name: np.asarray(cost, np.float32) for name, cost in found.items()}


@pytest.mark.parametrize("solver", ["host", "device"])
@pytest.mark.parametrize("name", costs())
def test_cost_is_the_optimum(name, solver):
    cost = costs()[name]

    def on_device(cost):
        return assignment._solve_on_device(assignment.reduce_cost(cost))

    solve = {"host": assignment.optimal_assignment, "device": on_device}[solver]
    rows = np.asarray(jit(solve)(cost))
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(cost)))
    exact = cost.astype(np.float64)
    best = exact[linear_sum_assignment(exact)].sum()
    # The potentials are taken away in float32, so the entries are rounded at their largest.
    rounding = 1e-6 * np.abs(exact).max() * len(cost)
    got = exact[rows, np.arange(len(cost))].sum()
    assert best <= got + 1e-12 * abs(got) and got - best <= rounding


@pytest.mark.parametrize("name", costs())
def test_reduced_cost_has_the_same_differences_and_zeros(name):
    """What is taken away is f_i + g_j: the second differences stay; each line has its zero."""
    cost = costs()[name]
    reduced = np.asarray(jit(assignment.reduce_cost)(cost), np.float64)
    assert np.isfinite(reduced).all() and reduced.min() == 0
    assert (reduced.min(0) == 0).all() and (reduced.min(1) == 0).all()
    change = reduced - cost
    change = change - change[:1] - change[:, :1] + change[0, 0]
    np.testing.assert_allclose(change, 0, atol=4e-6 * np.abs(cost).max())


def test_potentials_are_close_to_the_dual_optimum():
    """At the optimum the reduced cost of the best permutation is zero: a fifth of it is left."""
    cost = costs()["normal"]
    plain = np.asarray(assignment._subtract_minima(jnp.asarray(cost)), np.float64)
    reduced = np.asarray(assignment.reduce_cost(jnp.asarray(cost)), np.float64)
    best = linear_sum_assignment(plain)
    assert 0 < plain[best].sum() and reduced[best].sum() < 0.2 * plain[best].sum()


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


def test_device_code_holds_no_callback():
    """Other platforms solve it on the device."""
    lowered = jax.jit(assignment.optimal_assignment).trace(jnp.zeros((4, 4)))
    assert "callback" not in lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "callback" in lowered.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("scale", [1e-30, 1e20, 3e37])
def test_costs_of_any_size(scale):
    cost = jnp.array([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0], [3.0, 2.0, 2.0]]) * scale
    np.testing.assert_array_equal(jax.jit(assignment.optimal_assignment)(cost), [1, 0, 2])


def test_an_empty_matrix_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        assignment.optimal_assignment(jnp.zeros((0, 0)))
