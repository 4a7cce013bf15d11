"""One conformance suite over all couplings, and the optimum of the optimal one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from scipy.optimize import linear_sum_assignment

import fmjax as fm
from fmjax.couplings import exact
from fmjax.training import sharding

COUPLINGS = {"independent": fm.independent, "minibatch_ot": fm.minibatch_ot}
all_couplings = pytest.mark.parametrize("name", COUPLINGS)
KEY = jax.random.key(0)


def draw(shape, seed=0, shift=0.0):
    x0, x1 = np.random.default_rng(seed).standard_normal((2, *shape)) + shift
    return jnp.asarray(x0, jnp.float32), jnp.asarray(x1, jnp.float32)


def squared_distances(x0, x1):
    """[batch, batch] in float64."""
    x0, x1 = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (x0, x1))
    return ((x0[:, None] - x1[None]) ** 2).sum(-1)


@all_couplings
@pytest.mark.parametrize("shape", [(16, 2), (6, 4, 4, 2)])
def test_permutes_the_source_without_replacement(name, shape):
    x0, x1 = draw(shape)
    before = np.array(x1)
    paired = COUPLINGS[name](KEY, x0, x1)
    assert (paired.shape, paired.dtype) == (x0.shape, x0.dtype)

    def rows(x):
        return sorted(map(tuple, np.asarray(x).reshape(len(x), -1)))

    assert rows(paired) == rows(x0)
    np.testing.assert_array_equal(x1, before)  # so that labels stay where they are
    np.testing.assert_array_equal(jit(COUPLINGS[name])(KEY, x0, x1), paired)
    np.testing.assert_array_equal(COUPLINGS[name](KEY, x0, x1), paired)


@all_couplings
def test_shapes_must_agree(name):
    x0, x1 = draw((4, 3))
    for wrong in (x1[:3], x1[:, :2], x1[:, None]):
        with pytest.raises(ValueError, match="x0 and x1 must have one shape"):
            COUPLINGS[name](KEY, x0, wrong)


def test_independent_leaves_the_pairs():
    x0, x1 = draw((8, 2))
    np.testing.assert_array_equal(fm.independent(KEY, x0, x1), x0)


def optimum(x0, x1):
    distances = squared_distances(x0, x1)
    return distances[linear_sum_assignment(distances)].sum()


def cost_of(x0, x1):
    difference = np.asarray(x0, np.float64) - np.asarray(x1, np.float64)
    return np.square(difference).sum()


@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (7, 3), (33, 2), (8, 4, 4, 3), (40, 700)])
def test_minibatch_ot_has_scipys_cost(shape):
    coupling = jit(fm.minibatch_ot)
    for seed in range(3):
        x0, x1 = draw(shape, seed)
        cost = cost_of(coupling(KEY, x0, x1), x1)
        np.testing.assert_allclose(cost, optimum(x0, x1), rtol=1e-12)
        if 2 < shape[0] and shape != (40, 700):
            assert cost < 0.95 * cost_of(x0, x1)  # or the batch would test nothing


def points(name, dim):
    """Pairs `[48, dim]` whose costs have a wide range, in float64."""
    rng = np.random.default_rng(0)
    x0, x1 = 0.1 * rng.standard_normal((2, 48, dim))
    centres = np.repeat([[1.0], [-1.0]], 24, axis=0)
    scales = np.geomspace(1e-3, 1e3, dim)
    return {
        **{f"clusters at {r:g}": (x0 + r * centres, x1 + r * centres) for r in (1e2, 1e4, 1e8)},
        "far from the origin": (x0 + 3e5, x1 + 3e5),
        "an outlier": (x0 + 1e6 * (np.arange(48) == 7)[:, None], x1),
        "tiny": (1e-30 * x0, 1e-30 * x1),
        "huge": (1e18 * x0, 1e18 * x1),
        "mixed scales": (scales * x0, scales * x1),
        "apart": (x0 + 1e4, x1 - 1e4),
        "duplicates": (np.repeat(x0[:6], 8, axis=0), x1),
    }[name]


RANGES = [f"clusters at {r:g}" for r in (1e2, 1e4, 1e8)] + ["far from the origin", "an outlier"]
RANGES += ["tiny", "huge", "mixed scales", "apart", "duplicates"]


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("dim", [2, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_minibatch_ot_is_exact_whatever_the_range(name, dim, dtype):
    """The cost of SciPy's assignment on float64 distances of the numbers given.

    On a GPU or TPU in float32, to that dtype's rounding of the largest cost, as the docstring says.
    """
    with jax.enable_x64(dtype == np.float64), jax.numpy_dtype_promotion("standard"):
        x0, x1 = (jnp.asarray(x, dtype) for x in points(name, dim))
        paired = jax.jit(fm.minibatch_ot)(KEY, x0, x1)
    least = optimum(x0, x1)
    coarse = jax.default_backend() != "cpu" and dtype == np.float32
    rounding = 1e-5 * squared_distances(x0, x1).max() if coarse else 0
    np.testing.assert_allclose(cost_of(paired, x1), least, rtol=1e-12, atol=rounding)


def test_device_code_holds_no_callback():
    """Other platforms pair on the device."""
    traced = jax.jit(fm.minibatch_ot).trace(KEY, jnp.zeros((4, 2)), jnp.zeros((4, 2)))
    assert "callback" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "callback" in traced.lower(lowering_platforms=("cpu",)).as_text()


def test_on_the_device_the_cost_is_that_of_float32():
    for shape in ((33, 2), (24, 60)):
        x0, x1 = draw(shape)
        rows = jit(exact._on_device)(x0, x1)
        largest = squared_distances(x0, x1).max()
        assert cost_of(x0[rows], x1) - optimum(x0, x1) <= 1e-5 * largest


def test_memory_is_a_few_cost_matrices():
    batch = 512
    arg = jax.ShapeDtypeStruct((batch, 20), jnp.float32)
    compiled = jax.jit(lambda x0, x1: fm.minibatch_ot(KEY, x0, x1)).lower(arg, arg).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * batch * batch * 4


def test_minibatch_ot_by_hand():
    """The best of all 4! pairings, whatever the key and the order in which the source came."""
    x0, x1 = draw((4, 2))
    distances = squared_distances(x0, x1)
    best = min(itertools.permutations(range(4)), key=lambda p: distances[list(p), range(4)].sum())
    want = np.asarray(x0)[list(best)]
    np.testing.assert_array_equal(fm.minibatch_ot(KEY, x0, x1), want)
    np.testing.assert_array_equal(fm.minibatch_ot(jax.random.key(7), x0, x1), want)
    np.testing.assert_array_equal(fm.minibatch_ot(KEY, x0[::-1], x1), want)


def test_gradients_follow_the_permutation():
    x0, x1 = draw((7, 2))
    paired = np.asarray(fm.minibatch_ot(KEY, x0, x1))
    weights = jnp.arange(7, dtype=jnp.float32)[:, None]

    def weighted(x0, x1):
        return jnp.sum(weights * fm.minibatch_ot(KEY, x0, x1))

    of_x0, of_x1 = jit(jax.grad(weighted, (0, 1)))(x0, x1)
    position = [np.flatnonzero((paired == row).all(1)).item() for row in np.asarray(x0)]
    np.testing.assert_array_equal(of_x0, np.broadcast_to(np.array(position)[:, None], (7, 2)))
    np.testing.assert_array_equal(of_x1, np.zeros((7, 2)))


def test_minibatch_ot_sorts_on_the_line():
    """In one dimension the optimal pairing is the monotone one."""
    x0, x1 = draw((65, 1))
    paired = np.asarray(jit(fm.minibatch_ot)(KEY, x0, x1))
    np.testing.assert_array_equal(paired[np.argsort(x1, axis=0)[:, 0]], np.sort(x0, axis=0))


def test_minibatch_ot_undoes_a_shuffle():
    """Points moved a little and shuffled find their own again, near or far."""
    x1, noise = draw((50, 8))
    order = np.random.default_rng(1).permutation(50)
    for shift in (0.0, 100.0):
        x0 = (x1 + 0.01 * noise + shift)[order]
        paired = jit(fm.minibatch_ot)(KEY, x0, x1)
        np.testing.assert_array_equal(paired, x0[np.argsort(order)])


@pytest.mark.parametrize("x0_kind", ["same", "duplicated", "identical"])
def test_minibatch_ot_of_degenerate_points(x0_kind):
    x0, x1 = draw((24, 3))
    x0 = {"same": x1[::-1], "duplicated": jnp.repeat(x0[:6], 4, axis=0), "identical": 0 * x0}
    x0 = x0[x0_kind]
    paired = jit(fm.minibatch_ot)(KEY, x0, x1)
    np.testing.assert_allclose(cost_of(paired, x1), optimum(x0, x1), rtol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_dtypes_are_kept_and_optimal(dtype):
    x0, x1 = (x.astype(dtype) for x in draw((33, 5)))
    paired = jit(fm.minibatch_ot)(KEY, x0, x1)
    assert paired.dtype == dtype
    np.testing.assert_allclose(cost_of(paired, x1), optimum(x0, x1), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_comes_out_as_nan(bad, which):
    """So that a training loop that stops at NaN stops here too, on every platform."""
    pair = list(draw((8, 2)))
    pair[which] = pair[which].at[3, 1].set(bad)
    assert np.isnan(jit(fm.minibatch_ot)(KEY, *pair)).all()


def test_integers_are_refused():
    x0, x1 = draw((8, 2))
    with pytest.raises(ValueError, match="x1 must be floating"):
        fm.minibatch_ot(KEY, x0, x1.astype(jnp.int32))


@pytest.mark.slow
def test_vmap_of_minibatch_ot_is_its_loop():
    x0, x1 = draw((3, 12, 2))
    want = np.stack([fm.minibatch_ot(KEY, *pair) for pair in zip(x0, x1, strict=True)])
    got = jit(jax.vmap(fm.minibatch_ot, (None, 0, 0)))(KEY, x0, x1)
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("constrained", [True, False])
def test_minibatch_ot_on_a_mesh(constrained):
    mesh = sharding.make_mesh()
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    @jax.jit
    def pair(x0, x1):
        if constrained:
            x0, x1 = jax.lax.with_sharding_constraint((x0, x1), whole)
        return fm.minibatch_ot(KEY, x0, x1)

    for seed in range(5):
        x0, x1 = draw((16, 3), seed)
        got = pair(*jax.device_put((x0, x1), split))
        np.testing.assert_array_equal(got, fm.minibatch_ot(KEY, x0, x1))
