"""Own step sizes: closed forms, each example as if it were alone, counts, devices, failures.

Where two solves are compared they run in float64: in float32, at a tolerance of 1e-5, a rounding is
a hundredth of an error estimate, moves the step sizes and, with them, the result by up to 1e-5.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gaussian_flow, jit
from oracles import strict_dtypes as strict_dtypes  # an autouse fixture
from oracles import x64 as x64

import fmjax as fm
from fmjax.solve import each
from fmjax.training import sharding

FINE = diffrax.PIDController(rtol=1e-6, atol=1e-6)
SOLVERS = {"heun": diffrax.Heun(), "tsit5": diffrax.Tsit5(), "dopri8": diffrax.Dopri8()}
KEY = jax.random.key(0)


def spin(t, x):
    """Turns x by 12 exp(-|x|^2) per unit of time: the inner points take many more steps."""
    rate = 12 * jnp.exp(-jnp.sum(x**2, axis=-1, keepdims=True))
    return rate * jnp.stack([-x[..., 1], x[..., 0]], axis=-1)


def spun(x, t=1.0):
    """Where `spin` takes x, in numpy float64."""
    x = np.asarray(x, np.float64)
    angle = t * 12 * np.exp(-(x**2).sum(1))
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], axis=1)


def draw(num, dim=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((num, dim)), jnp.float32)


X = draw(13)


def wide(x):
    return x.astype(jnp.float64)


def in_a_lane(num_evaluations, solver=diffrax.Tsit5()):  # noqa: B008 (it holds no state)
    """What a solve of one example costs in a lane, from what it costs alone.

    Alone, the first stage is evaluated again at each retry of the first step, fewer than there are
    stages here; a lane keeps it.
    """
    first = int(solver.tableau.fsal)
    per_step = solver.tableau.num_stages - first
    return first + (num_evaluations - first) // per_step * per_step


@functools.cache
def alone():
    """(x1, evaluations in a lane) of every row of X at batch 1, by `fm.integrate` in float64."""
    solve = jit(lambda x: fm.integrate(spin, x))
    solved = [solve(x[None]) for x in wide(X)]
    num_evaluations = np.stack([s.num_evaluations for s in solved])
    return np.stack([s.x[-1, 0] for s in solved]), in_a_lane(num_evaluations)


@pytest.mark.slow
@pytest.mark.parametrize("event", [(2,), (4, 4, 2)])
def test_gaussian_to_gaussian(event):
    flow = gaussian_flow(event)
    x0 = draw(9, int(np.prod(event))).reshape(9, *event)
    x1 = jit(lambda x: each.sample_each(flow.velocity, x, stepsize_controller=FINE))(x0)
    np.testing.assert_allclose(x1, flow.flow(1.0, x0), atol=1e-5)

    def log_prob(x):
        return each.log_prob_each(flow.velocity, x, stepsize_controller=FINE, num_lanes=4)

    # Of 32 dimensions, each with its own rounding: relative to a log-density of some -30 nats.
    np.testing.assert_allclose(jit(log_prob)(x1), flow.log_prob(1.0, x1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [None, 1, 3, 13, 40])
def test_as_if_alone(num_lanes, x64):
    """The same steps as at batch 1, for every number of lanes, in jit and without."""
    want, num_evaluations = alone()
    assert num_evaluations.max() > 2 * num_evaluations.min()  # or the batch would test nothing
    solve = functools.partial(each.integrate_each, spin, num_lanes=num_lanes)
    got = jit(solve)(wide(X))
    np.testing.assert_array_equal(got.num_evaluations, num_evaluations)
    np.testing.assert_allclose(got.x, want, atol=1e-10)
    np.testing.assert_allclose(got.x, spun(X), atol=3e-4)
    np.testing.assert_allclose(jit(solve)(X).x, want, atol=1e-4)
    if num_lanes == 3:
        np.testing.assert_allclose(solve(wide(X)).x, got.x, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_and_controllers_step_as_diffrax_does(name, x64):
    """PI control and times to step on; with the last stage reused (Tsit5) and without."""
    pid = diffrax.PIDController(rtol=1e-4, atol=1e-5, pcoeff=0.3, icoeff=0.4, dtmax=0.2)
    controller = diffrax.ClipStepSizeController(pid, step_ts=jnp.array([0.2, 0.33, 0.7]))
    how = {"solver": SOLVERS[name], "stepsize_controller": controller, "t0": 0.9, "t1": 0.1}
    got = jit(lambda x: each.integrate_each(spin, x, num_lanes=2, **how))(wide(X[:5]))
    solve = jit(lambda x: fm.integrate(spin, x, **how))
    for i, x in enumerate(wide(X[:5])):
        want = solve(x[None])
        assert got.num_evaluations[i] == in_a_lane(want.num_evaluations, SOLVERS[name])
        np.testing.assert_allclose(got.x[i], want.x[-1, 0], atol=1e-10)


def test_backwards_in_time_and_there_and_back():
    back = jit(lambda x: each.sample_each(spin, x, t0=1.0, t1=0.0, stepsize_controller=FINE))
    there = jit(lambda x: each.sample_each(spin, x, stepsize_controller=FINE))
    np.testing.assert_allclose(back(X), spun(X, -1.0), atol=1e-4)
    np.testing.assert_allclose(back(there(X)), X, atol=1e-4)


def test_batch_mates_and_their_order_do_not_matter(x64):
    solve, x = jit(functools.partial(each.integrate_each, spin, num_lanes=3)), wide(X)
    got = solve(x)
    order = np.random.default_rng(0).permutation(len(x))
    mixed = solve(x[order])
    np.testing.assert_allclose(mixed.x, got.x[order], atol=1e-10)
    np.testing.assert_array_equal(mixed.num_evaluations, got.num_evaluations[order])
    stiff = solve(x.at[4].set(1e-3))  # it turns fastest
    others = np.arange(len(x)) != 4
    np.testing.assert_allclose(stiff.x[others], got.x[others], atol=1e-10)


def test_one_example_alone_in_its_batch(x64):
    want, num_evaluations = alone()
    got = jit(functools.partial(each.integrate_each, spin))(wide(X[:1]))
    np.testing.assert_allclose(got.x, want[:1], atol=1e-10)
    assert int(got.num_evaluations[0]) == int(got.num_calls) == num_evaluations[0]


class Counter:
    """Counts, as they run, the calls of a velocity lane by lane."""

    def __init__(self, velocity=spin):
        self.velocity, self.count = velocity, 0

    def __call__(self, t, x):
        jax.debug.callback(self.add, x)
        return self.velocity(t, x)

    def add(self, x):
        self.count += len(x)


@pytest.mark.slow
@pytest.mark.parametrize("num_lanes", [1, 3, 13])
@pytest.mark.parametrize("name", SOLVERS)
def test_num_calls_is_the_number_of_calls(name, num_lanes):
    counter, solver = Counter(), SOLVERS[name]
    solve = functools.partial(each.integrate_each, counter, num_lanes=num_lanes, solver=solver)
    coarse = diffrax.PIDController(rtol=1e-3, atol=1e-3)
    got = jax.block_until_ready(jit(lambda x: solve(x, stepsize_controller=coarse))(X))
    jax.effects_barrier()
    assert counter.count == num_lanes * got.num_calls
    useful = got.num_evaluations.sum()
    assert useful == counter.count if num_lanes == 1 else useful < counter.count
    # Lanes idle at the end alone: each for less than the longest solve, and its part of a row.
    assert counter.count - useful <= num_lanes * got.num_evaluations.max()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads the CPU's own program")
def test_shared_weights_make_one_batched_convolution():
    weights = 0.1 * jax.random.normal(KEY, (3, 3, 1, 1))
    layout = ("NHWC", "HWIO", "NHWC")

    def velocity(t, x):
        return jax.lax.conv_general_dilated(x, weights, (1, 1), "SAME", dimension_numbers=layout)

    solve = jax.jit(functools.partial(each.sample_each, velocity, num_lanes=3))
    text = solve.lower(jnp.zeros((6, 8, 8, 1))).compile().as_text()
    convolutions = [line for line in text.splitlines() if " convolution(" in line]
    assert convolutions and all("= f32[3,8,8,1]" in line for line in convolutions)
    # The batch is copied once, on the way in, and written in place by the loop.
    copies = [line for line in text.splitlines() if "= f32[6,8,8,1]" in line and " copy(" in line]
    assert len(copies) <= 1


def test_labels_travel_with_their_examples():
    rates = jnp.linspace(-2.0, 2.0, len(X))
    velocity = each.PerRow(lambda row: lambda t, x: rates[row] * x)
    x1 = jit(functools.partial(each.sample_each, velocity, num_lanes=4))(X)
    np.testing.assert_allclose(x1, np.exp(rates)[:, None] * X, rtol=1e-4)  # the tolerance


def test_log_prob_equals_each_example_alone(x64):
    solve, x = jit(lambda x: fm.log_prob(spin, x)), wide(X)
    want = np.concatenate([solve(x[i : i + 1]) for i in range(len(x))])
    got = jit(functools.partial(each.log_prob_each, spin, num_lanes=3))(x)
    np.testing.assert_allclose(got, want, atol=1e-9)
    np.testing.assert_allclose(got, fm.standard_normal_log_prob(x), atol=1e-3)  # spinning keeps it


def shear(t, x):
    """Its divergence varies with x, and its Jacobian is not diagonal: probes differ."""
    return jnp.stack([jnp.sin(x[..., 1] * 2) + x[..., 0], x[..., 0] * x[..., 1]], axis=-1)


@pytest.mark.slow
def test_hutchinson_probes_are_the_rows_own(x64):
    of_row = lambda row: fm.hutchinson_divergence(jax.random.fold_in(KEY, row), 2)  # noqa: E731
    per_row, x = each.PerRow(of_row), wide(X[:5])
    solve = jit(functools.partial(each.log_prob_each, shear, divergence=per_row, num_lanes=2))
    got = solve(x)
    single = jit(lambda x, row: fm.log_prob(shear, x, divergence=of_row(row)))
    want = [single(x[i : i + 1], jnp.int32(i))[0] for i in range(5)]
    np.testing.assert_allclose(got, want, atol=1e-9)
    order = jnp.array([3, 1, 4, 0, 2], jnp.int32)
    np.testing.assert_allclose(solve(x[order], rows=order), got[order], atol=1e-9)
    others = solve(x, rows=jnp.arange(5, 10, dtype=jnp.int32))
    assert np.abs(got - others).max() > 0.01  # or the probes would show nothing

    estimates = each.PerRow(lambda row: fm.hutchinson_estimates(jax.random.fold_in(KEY, row), 2))
    estimated = jit(functools.partial(each.log_prob_each, shear, divergence=estimates))(x)
    assert estimated.shape == (2, 5)
    # The mean of two solves, each with the error control of both.
    np.testing.assert_allclose(estimated.mean(0), got, atol=1e-4)


@pytest.mark.slow
def test_devices_run_their_own_queues(x64):
    """Eight devices give what one gives, probes included, and say so without a collective."""
    mesh, x = sharding.make_mesh(), wide(draw(32))
    split = jax.sharding.PartitionSpec("data")
    of_row = lambda row: fm.hutchinson_divergence(jax.random.fold_in(KEY, row))  # noqa: E731

    def log_prob(x, rows):
        return each.log_prob_each(shear, x, divergence=each.PerRow(of_row), rows=rows)

    mapped = jax.shard_map(log_prob, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    rows = jnp.arange(len(x), dtype=jnp.int32)
    where = sharding.batch_sharding(mesh)
    args = jax.device_put((x, rows), (where, where))
    compiled = jit(mapped).lower(*args).compile()
    assert not any(word in compiled.as_text() for word in ("all-reduce", "all-gather", "permute"))
    got = compiled(*args)
    assert got.sharding.is_equivalent_to(where, 1)
    np.testing.assert_allclose(got, jit(log_prob)(x, rows), atol=1e-9)


@pytest.mark.slow
def test_dtypes(x64):
    """Solved in at least float32, in the dtype of x0 above it, and given back in that of x0."""
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        seen = set()

        def velocity(t, x, seen=seen):
            seen.add((t.dtype, x.dtype))
            return spin(t, x)

        solve = functools.partial(each.sample_each, velocity, stepsize_controller=FINE)
        got = jit(solve)(X[:3].astype(dtype))
        inside = jnp.dtype(jnp.float32 if dtype == jnp.bfloat16 else dtype)
        assert got.dtype == dtype and seen == {(inside, inside)}
        want = spun(X[:3].astype(dtype).astype(jnp.float32))
        # Of bfloat16 the result has eight bits.
        atol = 1e-2 if dtype == jnp.bfloat16 else 1e-4
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=atol)


def bad_inside(value, t_bad=0.374):
    """Turns into `value` after t_bad where x_0 > 1."""
    return lambda t, x: jnp.where((t > t_bad) & (x[..., :1] > 1), value, 0.0) * x


FAILURES = {
    "nan": (jnp.nan, {}, r"row 5 stopped at t = 0\.374: the state, the vel"),
    "inf": (jnp.inf, {}, r"row 5 stopped at t = 0\.374: the state, the vel"),
    "steps": (1e3, {"max_steps": 9}, r"row 5 stopped at t = 0\.(3|4)\d*: max_steps = 9 were"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("num_lanes", [1, 3, 7])
def test_failures_name_the_row_and_the_time(name, num_lanes):
    value, how, message = FAILURES[name]
    x = jnp.zeros((7, 2)).at[5].set(2.0)
    solve = jit(lambda x: each.sample_each(bad_inside(value), x, num_lanes=num_lanes, **how))
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(solve(x))
    assert np.isfinite(solve(jnp.zeros((7, 2)))).all()


@pytest.mark.slow
def test_failures_name_the_row_of_the_whole_batch_and_backwards_the_time():
    x, rows = jnp.zeros((3, 2)).at[1].set(2.0), jnp.array([40, 11, 12], jnp.int32)
    velocity = lambda t, x: bad_inside(jnp.nan)(1 - t, x)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"row 11 stopped at t = 0\.626"):
        each.sample_each(velocity, x, t0=1.0, t1=0.0, rows=rows)


@pytest.mark.slow
def test_what_succeeds_is_kept_where_others_fail(x64):
    """Rows 2 and 9 end in a pole at t = 1 / x; all others are as if these were not there."""
    x0 = wide(X[:, :1]).clip(-0.9, 0.9).at[2].set(2.0).at[9].set(4.0)
    solve = jit(lambda x: each.attempt_each(lambda t, x: x**2, x, num_lanes=3, max_steps=200))
    attempts, bad = solve(x0), np.isin(np.arange(len(x0)), (2, 9))
    np.testing.assert_array_equal(np.isnan(attempts.x[:, 0]), bad)
    np.testing.assert_array_equal(attempts.reached == 1, ~bad)
    np.testing.assert_allclose(attempts.reached[bad], [0.5, 0.25], atol=1e-4)
    np.testing.assert_allclose(attempts.x[~bad], (x0 / (1 - x0))[~bad], rtol=1e-4)
    alone = jit(lambda x: each.integrate_each(lambda t, x: x**2, x))(x0[~bad])
    np.testing.assert_allclose(attempts.x[~bad], alone.x, atol=1e-12)
    np.testing.assert_array_equal(attempts.num_evaluations[~bad], alone.num_evaluations)


@pytest.mark.slow
def test_jump_times_are_stepped_to_and_counted():
    jumps = diffrax.ClipStepSizeController(FINE, jump_ts=jnp.array([0.5]))
    counter = Counter(lambda t, x: jnp.where(t < 0.5, -1.0, 1.0) * x)
    solve = functools.partial(each.integrate_each, counter, num_lanes=3, stepsize_controller=jumps)
    got = jax.block_until_ready(jit(solve)(X))
    jax.effects_barrier()
    assert counter.count == 3 * got.num_calls
    np.testing.assert_allclose(got.x, X, rtol=2e-6)
    alone = jit(lambda x: fm.integrate(counter.velocity, x, stepsize_controller=jumps))(X[:1])
    assert got.num_evaluations[0] == alone.num_evaluations


def test_the_last_step_allowed_may_arrive(x64):
    _, num_evaluations = alone()
    num_steps = int(num_evaluations.max() - 1) // 6
    solve = jit(lambda x: each.sample_each(spin, x, max_steps=num_steps))
    assert np.isfinite(solve(wide(X))).all()
    with pytest.raises(RuntimeError, match=f"max_steps = {num_steps - 1} were"):
        jax.block_until_ready(
            jit(lambda x: each.sample_each(spin, x, max_steps=num_steps - 1))(wide(X))
        )


@pytest.mark.parametrize("solve", [each.sample_each, each.log_prob_each])
def test_errors_of_use(solve):
    def refused(match, x=X, velocity=spin, **how):
        with pytest.raises(ValueError, match=match):
            solve(velocity, x, **how)

    refused("num_lanes must be at least 1", num_lanes=0)
    refused("got 2 rows for 13 examples", rows=jnp.arange(2))
    refused("not empty", x=X[:0])
    refused("must be floating", x=jnp.ones((2, 2), jnp.uint8))
    refused("t0 and t1 must differ", t0=1.0, t1=1.0)
    refused("adaptive controller; got StepTo", stepsize_controller=diffrax.StepTo([0.0, 1.0]))
    refused(
        "adaptive controller; got ConstantStepSize", stepsize_controller=diffrax.ConstantStepSize()
    )
    refused("Euler has no error estimate", solver=diffrax.Euler())
    refused("explicit Runge-Kutta", solver=diffrax.Kvaerno3())
    refused("the velocity must return", velocity=lambda t, x: x[:, :1])
    refused("got HalfSolver", solver=diffrax.HalfSolver(diffrax.Tsit5()))
