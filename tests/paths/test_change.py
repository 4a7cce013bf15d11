"""Change of schedule, matched grids and DDIM, against the closed forms of Gaussian data."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PATHS, gaussian_predictions, gaussian_velocity, jit, quick_on
from oracles import x64 as x64

import fmjax as fm

MEAN, STD = np.array([0.7, -1.2, 0.3]), np.array([0.5, 1.5, 1.0])
INSIDE = np.array([0.05, 0.3, 0.5, 0.8, 0.95])
TIMES = np.array([0.0, 1e-9, *INSIDE, 1 - 1e-6, 1.0])
STEEP_END = {"vp", "linear_vp"}  # sigma' is infinite at t = 1
FLAT_START = {"polynomial_2", "polynomial_1.5"}  # W = 0 at t = 0
REACHES_BOTH_ENDS = set(PATHS) - {"vp", "cond_ot_0.1"}


def exact(name):
    return gaussian_velocity(PATHS[name], MEAN, STD)


def points(num=5, dtype=None):
    return jnp.asarray(np.random.default_rng(0).standard_normal((num, 3)), dtype)


def plain(velocity):
    """Hides the predictions, so that the next change converts the velocity."""
    return lambda t, x: velocity(t, x)


@functools.cache
def changed(name):
    """Velocities at TIMES along `name` from cond_ot's, back from it, and there and back."""
    x, path, straight = points(len(TIMES)), PATHS[name], fm.cond_ot()
    there = fm.change_path(exact("cond_ot"), straight, path)
    velocities = {
        "there": there,
        "from": fm.change_path(exact(name), path, straight),
        "back": fm.change_path(there, path, straight),
        "converted": fm.change_path(plain(there), path, straight),
        "want": exact(name),
        "straight": exact("cond_ot"),
    }
    got = jit(lambda t, x: {key: velocity(t, x) for key, velocity in velocities.items()})
    return {key: np.asarray(value) for key, value in got(jnp.asarray(TIMES), x).items()}


@quick_on("vp", "cosine")
def test_to_every_path_both_ends_included(name, x64):
    """From cond_ot, whose exact velocity is known, to the exact velocity of every other."""
    got, finite = changed(name), TIMES < 1 if name in STEEP_END else TIMES <= 1
    # 1e-6 before its end the slope of vp is 500 times that of others.
    tolerance = 1e-12 if name in STEEP_END else 1e-13
    want = got["want"][finite]
    np.testing.assert_allclose(got["there"][finite], want, rtol=tolerance, atol=tolerance)


@quick_on("vp", "cosine")
def test_from_every_path_and_there_and_back(name, x64):
    """Through velocities, where those are finite, and through predictions at both ends."""
    got = changed(name)
    regular = np.ones(len(TIMES), bool)
    if name == "cond_ot_0.1":
        regular &= TIMES <= 10 / 11  # past it it has no point of cond_ot
    if name == "vp":
        regular &= TIMES >= 0.0066  # nor has this one below
    if name in STEEP_END:
        # There the rounding of t is a rounding of sigma by 1e-4 of it, and of u by 1e-10.
        regular &= TIMES != 1 - 1e-6
    want = got["straight"]
    np.testing.assert_allclose(got["back"][regular], want[regular], rtol=1e-11, atol=1e-11)
    if name in STEEP_END:
        regular &= TIMES < 1
    if name in FLAT_START:
        regular &= TIMES > 1e-5
    for key in ("from", "converted"):
        np.testing.assert_allclose(got[key][regular], want[regular], rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_below_alpha_0_of_vp_identities_hold_to_alpha_0(x64):
    """The error at t = 0 is in proportion to alpha(0), 0.0066 by default."""
    errors, starts = [], []
    for beta_max in (20.0, 30.0):
        path = fm.vp(beta_max=beta_max)
        there = fm.change_path(exact("cond_ot"), fm.cond_ot(), path)
        back = jit(fm.change_path(there, path, fm.cond_ot()))(jnp.zeros(()), points())
        errors.append(np.abs(back - exact("cond_ot")(0.0, points())).max())
        starts.append(float(path.alpha(jnp.zeros(()))))
    assert starts[0] == pytest.approx(0.00657, rel=1e-3)
    np.testing.assert_allclose(errors[0] / errors[1], starts[0] / starts[1], rtol=0.02)


@pytest.mark.slow
@quick_on("vp", names=("vp", "linear_vp"))
@pytest.mark.parametrize("which", [pytest.param("x1", marks=pytest.mark.slow), "x0"])
def test_predictions_on_steep_paths_are_finite_at_the_data(name, which, x64):
    """DDPM's own case: its velocity is infinite at t = 1, its predictions are not."""
    path, x = PATHS[name], points()
    x1, x0 = gaussian_predictions(path, MEAN, STD)
    of_x0 = fm.from_x0(path, x0, floor=1e-3)
    velocity = of_x0 if which == "x0" else fm.from_x1(path, x1, floor=1e-3)
    with pytest.raises(ValueError, match="the velocity has no finite value"):
        velocity(jnp.asarray(1.0), x)
    with pytest.raises(ValueError, match=r"change_path has no finite value.*from_x0 or from_x1"):
        fm.change_path(plain(velocity), path, fm.cond_ot())(jnp.asarray(1.0), x)
    changed = fm.change_path(velocity, path, fm.cond_ot())
    end = jnp.asarray(1.0)
    got, slopes = jit(lambda x: (changed(end, x), jax.jacfwd(lambda x: changed(end, x))(x)))(x)
    # The rounding of x, of size 4, divided by the floor.
    np.testing.assert_allclose(got, exact("cond_ot")(1.0, x), rtol=0, atol=4 * 2.2e-16 / 1e-3)
    assert np.isfinite(slopes).all()


@pytest.mark.slow
@quick_on("vp")
def test_float32_both_ends_and_gradients(name):
    velocity = fm.change_path(exact("cond_ot"), fm.cond_ot(), PATHS[name])
    ts = np.array([0.0, *INSIDE, *([] if name in STEEP_END else [1.0])], np.float32)
    x = points(len(ts), jnp.float32)
    slopes = jax.grad(lambda t, x: velocity(t, x).sum(), (0, 1))
    got, (in_t, in_x) = jit(lambda t, x: (velocity(t, x), slopes(t, x)))(jnp.asarray(ts), x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact(name)(ts, x), rtol=2e-5, atol=2e-5)
    assert np.isfinite(in_x).all()
    # The second derivative of t^1.5 is infinite at 0.
    assert np.isfinite(in_t[1 if name == "polynomial_1.5" else 0 :]).all()


@pytest.mark.slow
def test_the_slope_in_time_is_that_of_the_closed_form(x64):
    velocity = fm.change_path(exact("cond_ot"), fm.cond_ot(), fm.cosine())
    x = points()
    ts = jnp.array([0.0, 0.3, 0.5, 0.9, 1.0])
    slopes = [
        jit(lambda t, f=f: jax.jvp(lambda t: f(t, x), (t,), (jnp.ones_like(t),))[1])(ts)
        for f in (velocity, exact("cosine"))
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
def test_jit_vmap_batch_and_dtype():
    velocity = fm.change_path(exact("cond_ot"), fm.cond_ot(), fm.vp())
    x, ts = points(dtype=jnp.float32), jnp.asarray(INSIDE, jnp.float32)
    eager = velocity(ts, x)
    np.testing.assert_allclose(jax.jit(velocity)(ts, x), eager, rtol=1e-5, atol=1e-5)
    one = jit(jax.vmap(lambda t, x: velocity(t, x[None])[0]))(ts, x)
    np.testing.assert_allclose(one, eager, rtol=1e-5, atol=1e-5)
    single = jit(velocity)
    for i, t in enumerate(ts):
        got = single(t, x[i : i + 1])
        np.testing.assert_allclose(got, eager[i : i + 1], rtol=1e-5, atol=1e-5)
    low = jit(velocity)(ts, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), eager, rtol=0.05, atol=0.05)  # 8 bits


@quick_on(names=("cosine", "polynomial_2"))
def test_samples_and_likelihoods_stay_the_same(name):
    velocity = fm.change_path(exact("cond_ot"), fm.cond_ot(), PATHS[name])
    fine = diffrax.PIDController(rtol=1e-6, atol=1e-6)
    x0 = points(dtype=jnp.float32)
    x1, got = jit(lambda x0: fm.sample_and_log_prob(velocity, x0, stepsize_controller=fine))(x0)
    np.testing.assert_allclose(x1, MEAN + STD * np.asarray(x0), rtol=1e-5, atol=1e-5)
    log_p = -0.5 * (np.asarray(x0) ** 2).sum(1) - np.log(STD).sum() - 1.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(got, log_p, rtol=1e-5, atol=1e-5)


@quick_on(names=("cosine", "polynomial_2", "own"))
def test_order_of_convergence_after_the_change(name, x64):
    velocity = fm.change_path(exact("cond_ot"), fm.cond_ot(), PATHS[name])
    x0, cases = points(), [(s, n) for s in (diffrax.Euler(), diffrax.Heun()) for n in (32, 64)]
    solve = jit(lambda x: [fm.sample(velocity, x, solver=s, num_steps=n) for s, n in cases])
    want = MEAN + STD * np.asarray(x0)
    errors = [np.linalg.norm(np.asarray(x1) - want) for x1 in solve(x0)]
    orders = np.log2([errors[0] / errors[1], errors[2] / errors[3]])
    np.testing.assert_allclose(orders, [1, 2], atol=0.15)


def test_one_call_for_each_evaluation():
    calls = []

    def counted(t, x):
        jax.debug.callback(lambda: calls.append(1))
        return 3 - x

    velocity = fm.change_path(counted, fm.cond_ot(), fm.cosine())
    solved = jit(lambda x0: fm.integrate(velocity, x0, solver=diffrax.Heun(), num_steps=5))
    num = int(solved(points(dtype=jnp.float32)).num_evaluations)
    jax.effects_barrier()
    assert num == len(calls) == 10


def test_matched_times_by_hand(x64):
    ts = jnp.linspace(0, 1, 11)
    cosine, sine = np.cos(np.pi / 2 * ts), np.sin(np.pi / 2 * ts)
    got = jit(lambda ts: fm.match_times(fm.cosine(), fm.cond_ot(), ts))(ts)
    np.testing.assert_allclose(got, sine / (sine + cosine), rtol=0, atol=1e-15)
    got = jit(lambda ts: fm.match_scales(fm.cosine(), fm.cond_ot(), ts))(ts)
    np.testing.assert_allclose(got, 1 / (sine + cosine), rtol=1e-15)
    got = jit(lambda ts: fm.match_times(fm.cond_ot(), fm.linear_vp(), ts))(ts)
    np.testing.assert_allclose(got, ts / np.hypot(ts, 1 - ts), rtol=0, atol=1e-15)
    pairs = [(fm.cosine(), PATHS[name]) for name in sorted(REACHES_BOTH_ENDS)]
    pairs += [(wanted, trained) for trained, wanted in pairs]
    ends = jit(lambda ts: [fm.match_times(*pair, ts) for pair in pairs])(jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends, [[0, 1]] * len(pairs))


def test_angles_that_a_path_does_not_reach_are_its_ends(x64):
    noisy, ts = fm.cond_ot(sigma_min=0.1), jnp.array([0.0, 0.5, 10 / 11, 0.95, 1.0])
    want = [0.0, 10 / 19, 1.0, 1.0, 1.0]  # s / (1 - 0.9 s) = t / (1 - t)
    match = jax.jit(lambda ts: fm.match_times(fm.cond_ot(), noisy, ts))
    np.testing.assert_allclose(match(ts), want, atol=1e-15)
    first = jit(lambda ts: fm.match_times(fm.cond_ot(), fm.vp(), ts))(jnp.array([0.006, 0.007]))
    assert first[0] == 0 < first[1]
    # From s = t / (1 - t + 0.9 t): its slope is 1 / (1 - 0.1 t)^2, and 0 past 10 / 11.
    slope = jax.jit(jax.vmap(jax.grad(match)))(ts)
    want = np.array([1, 1 / 0.95**2, 0, 0])
    np.testing.assert_allclose(slope[jnp.array([0, 1, 3, 4])], want, rtol=1e-13)


def test_a_shift_of_times_and_of_a_grid(x64):
    """SD3's shift is only a grid: sigma / alpha times the shift, and twice is its square."""

    @functools.partial(jit, static_argnums=1)
    def shift(ts, by):
        return fm.match_times(fm.AffinePath(lambda t: t, lambda t: by * (1 - t)), fm.cond_ot(), ts)

    ts = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(shift(ts, 3.0), ts / (ts + 3 * (1 - ts)), rtol=0, atol=1e-15)
    np.testing.assert_allclose(shift(shift(ts, 3.0), 3.0), shift(ts, 9.0), rtol=0, atol=1e-15)
    drawn = fm.uniform(jax.random.key(0), (100,))
    got = fm.shifted(fm.uniform, 3.0)(jax.random.key(0), (100,))
    np.testing.assert_allclose(got, shift(drawn, 3.0), rtol=1e-6)


@quick_on("cosine", names=("cosine", "vp", "linear_vp", "polynomial_2"))
def test_ddim_is_euler_after_the_change(name, x64):
    """x_s = alpha(s) x1 + sigma(s) x0 with the closed-form predictions, eight uneven steps."""
    path, x = PATHS[name], points()
    x1, x0 = gaussian_predictions(path, MEAN, STD)
    ts = jnp.asarray(np.array([0, 0.1, 0.25, 0.45, 0.6, 0.7, 0.85, 0.95, 1.0]))

    @jit
    def ddim(x):
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            x = path.alpha(s) * x1(t, x) + path.sigma(s) * x0(t, x)
        return x

    trained = fm.from_x0(path, x0, floor=1e-6) if name == "vp" else exact(name)
    if name in FLAT_START:
        trained = fm.from_x1(path, x1, floor=1e-6)
    velocity = fm.change_path(trained, path, fm.cond_ot())
    grid, scales = fm.match_times(path, fm.cond_ot(), ts), fm.match_scales(path, fm.cond_ot(), ts)
    options = {"solver": diffrax.Euler(), "stepsize_controller": diffrax.StepTo(grid)}
    y = jit(lambda y: fm.sample(velocity, y, t0=grid[0], t1=grid[-1], **options))(scales[0] * x)
    np.testing.assert_allclose(y / scales[-1], ddim(x), rtol=1e-12, atol=1e-12)


def test_wrong_input_is_refused():
    x, velocity = points(dtype=jnp.float32), exact("cond_ot")
    backwards = fm.AffinePath(alpha=lambda t: 1 - t, sigma=lambda t: t)
    for pair in ((fm.cond_ot(), backwards), (backwards, fm.cond_ot())):
        with pytest.raises(ValueError, match=r"alpha / sigma growing; got one from 1 / 0 to 0 / 1"):
            fm.change_path(velocity, *pair)
        with pytest.raises(ValueError, match="needs 1 - t for its t"):
            fm.match_times(*pair, jnp.ones(3))
    for pair in ((fm.cond_ot, fm.vp()), (fm.cond_ot(), None)):
        for function in (fm.match_times, fm.match_scales):
            with pytest.raises(ValueError, match="path must be"):
                function(*pair, jnp.ones(3))
        with pytest.raises(ValueError, match="path must be"):
            fm.change_path(velocity, *pair)
    with pytest.raises(ValueError, match="must be a function"):
        fm.change_path(x, fm.cond_ot(), fm.vp())
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        fm.match_times(fm.cond_ot(), fm.vp(), jnp.array([0.5, 500.0]))
    with pytest.raises(ValueError, match="no finite value where this path is singular; got t = 1"):
        fm.change_path(velocity, fm.cond_ot(), fm.vp())(jnp.asarray(1.0), x)
    with pytest.raises(ValueError, match="no finite value where this path is singular; got t = 0"):
        fm.change_path(velocity, fm.polynomial(2), fm.cond_ot())(jnp.asarray(0.0), x)
    wrong = fm.change_path(lambda t, x: x[:, :1], fm.cond_ot(), fm.cosine())
    with pytest.raises(ValueError, match=r"the velocity must return.*Nothing is broadcast"):
        wrong(jnp.asarray(0.5), x)
    with pytest.raises(ValueError, match="prefix of the shape of x"):
        fm.change_path(velocity, fm.cond_ot(), fm.cosine())(jnp.full((5, 1), 0.5), x)
