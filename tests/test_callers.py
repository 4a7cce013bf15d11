"""What callers give: their functions' results are checked in every room, their arrays taken alike.

A wrong shape that broadcasts is a wrong number that looks right, so each function that calls a
caller's refuses it, in the same words.
"""

import functools
import warnings

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import fmjax as fm
from fmjax import models
from fmjax.data import dequantization, pixels
from fmjax.solve import each

KEY, T = jax.random.key(0), jnp.asarray(0.5)
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2)), jnp.float32)
SAMPLE = fm.PathSample(jnp.full(3, 0.5), X, X)
EXACT = fm.exact_divergence()


def halve(t, x):
    return -0.5 * x


# Unoptimised code compiles faster.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
LOOSE = diffrax.PIDController(rtol=1e-2, atol=1e-2)

TAKE_A_VELOCITY = {
    "cfm_loss": lambda v: fm.cfm_loss(v, SAMPLE),
    "sample": lambda v: fm.sample(v, X, num_steps=1),
    "integrate": lambda v: fm.integrate(v, X, num_steps=1),
    "log_prob": lambda v: fm.log_prob(v, X, num_steps=1),
    "sample_and_log_prob": lambda v: fm.sample_and_log_prob(v, X, num_steps=1),
    "sample_each": lambda v: each.sample_each(v, X, stepsize_controller=LOOSE),
    "log_prob_each": lambda v: each.log_prob_each(v, X, stepsize_controller=LOOSE),
    "attempt_each": lambda v: each.attempt_each(v, X, stepsize_controller=LOOSE).x,
    "exact_divergence": lambda v: EXACT(v, T, X),
    "hutchinson_divergence": lambda v: fm.hutchinson_divergence(KEY)(v, T, X),
    "conditional": lambda v: fm.classifier_free_guidance(v, halve, 2.0)(T, X),
    "unconditional": lambda v: fm.classifier_free_guidance(halve, v, 2.0)(T, X),
    "guided": lambda v: fm.guidance_interval(v, halve, 0.2, 0.8)(T, X),
    "plain": lambda v: fm.guidance_interval(halve, v, 0.2, 0.8)(T, X),
    "main": lambda v: fm.autoguidance(v, halve, 2.0)(T, X),
    "bad": lambda v: fm.autoguidance(halve, v, 2.0)(T, X),
}
every_taker = pytest.mark.parametrize("name", TAKE_A_VELOCITY)

# What a velocity may return by mistake, and what is said of it.
WRONG = {
    "None": (lambda t, x: None, "got None. Is a return missing"),
    "(u, aux)": (lambda t, x: (x, {}), r"got a tuple of 2. Of \(u, aux\) return the first"),
    "a list": (lambda t, x: [[0.0, 0.0]], "got list"),
    "complex": (lambda t, x: x * 1j, "got complex64.*real part"),
    "integers": (lambda t, x: jnp.ones_like(x, int), "got int32.*astype"),
    "booleans": (lambda t, x: x > 0, "got bool.*astype"),
    "a column": (lambda t, x: x[:, :1], r"got float32 \(\d, 1\)"),
    "no batch": (lambda t, x: x[0], r"got float32 \(2,\)"),
    "a number": (lambda t, x: 1.0, "got 1.0"),
}


@every_taker
@pytest.mark.parametrize("what", WRONG)
def test_what_a_velocity_must_return(name, what):
    velocity, got = WRONG[what]
    with pytest.raises(ValueError, match=rf"must return a floating array of the shape .*{got}"):
        TAKE_A_VELOCITY[name](velocity)


@pytest.mark.slow
@every_taker
def test_another_floating_dtype_and_numpys_arrays_will_do(name):
    half, own, zero = jit(
        lambda: [
            jax.tree.leaves(TAKE_A_VELOCITY[name](velocity))
            for velocity in (
                lambda t, x: halve(t, x).astype(jnp.bfloat16),
                halve,
                lambda t, x: np.zeros(x.shape, np.float64),
            )
        ]
    )()
    for value, want, still in zip(half, own, zero, strict=True):
        np.testing.assert_allclose(value.astype(jnp.float32), want, rtol=2e-2, atol=2e-2)
        assert np.isfinite(still).all()


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, t, x):
        return nn.Dense(2)(x)


@every_taker
def test_what_is_no_velocity_is_refused(name):
    model = Tiny()
    params = model.init(KEY, T, X)
    keywords = functools.partial(model.apply, mutable=False)
    for velocity in (model, model.apply, jax.jit(model.apply), keywords):
        with pytest.raises(ValueError, match=r"needs its parameters.*partial\(model.apply, params"):
            TAKE_A_VELOCITY[name](velocity)
    for velocity in (params, None, 3.0):
        with pytest.raises(ValueError, match="must be a function"):
            TAKE_A_VELOCITY[name](velocity)
    if name == "cfm_loss":
        want = TAKE_A_VELOCITY[name](functools.partial(model.apply, params))
        np.testing.assert_array_equal(TAKE_A_VELOCITY[name](model.bind(params)), want)


def test_a_model_mapped_over_one_time_for_all():
    """An Equinox model takes one example; in a solve the time is one for all."""
    model = lambda t, x: -t * x  # noqa: E731
    for solve in (fm.sample, fm.log_prob):
        with pytest.raises(ValueError, match=r"t has the shape \[\].*in_axes=\(None, 0\)"):
            solve(jax.vmap(model), X, num_steps=1)
    fm.sample(jax.vmap(model, in_axes=(None, 0)), X, num_steps=1)
    with pytest.raises(ValueError, match="inconsistent sizes"):  # another error is left as it is
        fm.sample(lambda t, x: jax.vmap(jnp.add)(x, x[:1]), X, num_steps=1)


def log_normal(x):
    return jax.scipy.stats.norm.logpdf(x)


WRONG_DENSITIES = {
    "summed over the batch too": lambda x: log_normal(x).sum(),
    "a column": lambda x: log_normal(x).sum(-1, keepdims=True),
    "never summed": log_normal,
    "None": lambda x: None,
    "with a state": lambda x: (log_normal(x).sum(-1), {}),
    "integers": lambda x: jnp.zeros(len(x), int),
}


@pytest.mark.parametrize("what", WRONG_DENSITIES)
@pytest.mark.parametrize("batch", [2, 3])  # 2 is also the dimension
def test_what_a_source_density_must_return(what, batch):
    for solve in (fm.log_prob, fm.sample_and_log_prob, each.log_prob_each):
        with pytest.raises(ValueError, match=r"source_log_prob must return .* shape \(\d,\); got"):
            solve(halve, jnp.ones((batch, 2)), source_log_prob=WRONG_DENSITIES[what])


def test_a_source_density_in_half_precision_is_added_in_float32():
    got = fm.log_prob(halve, X, source_log_prob=lambda x: jnp.zeros(len(x), jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.ones(3), rtol=1e-5)  # -div v = 1/2 for each dimension


def divergence_of(change):
    return lambda v, t, x: change(*EXACT(v, t, x))


WRONG_DIVERGENCES = {
    "a column": lambda u, div: (u, div[:, None]),
    "summed over the batch": lambda u, div: (u, div.sum()),
    "another velocity": lambda u, div: (u[:, :1], div),
    "alone": lambda u, div: div,
    "three": lambda u, div: (u, div, {}),
    "None": lambda u, div: None,
    "complex": lambda u, div: (u, div * 1j),
    "integers": lambda u, div: (u, jnp.ones_like(div, int)),
    "three axes": lambda u, div: (u, div[None, None]),
}


@pytest.mark.parametrize("what", WRONG_DIVERGENCES)
def test_what_a_divergence_must_return(what):
    for solve in (fm.log_prob, fm.integrate_log_prob, fm.sample_and_log_prob):
        with pytest.raises(ValueError, match="[Tt]he divergence.* must return"):
            solve(halve, X, divergence=divergence_of(WRONG_DIVERGENCES[what]))
    if what != "a column":  # of one example a column is one estimate
        with pytest.raises(ValueError, match="[Tt]he divergence.* must return"):
            each.log_prob_each(halve, X, divergence=divergence_of(WRONG_DIVERGENCES[what]))


def test_a_probe_of_another_shape_is_refused():
    for probe in (
        lambda key, shape, dtype: jax.random.normal(key, shape[1:], dtype),
        lambda key, shape, dtype: jax.random.rademacher(key, shape),
    ):
        with pytest.raises(ValueError, match="probe must return"):
            fm.hutchinson_divergence(KEY, probe=probe)(halve, T, X)


def test_a_schedule_of_another_shape_is_refused():
    t = jnp.full(3, 0.5)
    for alpha in (lambda t: t[:, None], lambda t: None, lambda t: t * 1j, lambda t: (t, t)):
        with pytest.raises(ValueError, match=r"alpha\(t\) must return"):
            fm.sample_path(fm.AffinePath(alpha, lambda t: 1 - t), X, X, t)
    constant = fm.AffinePath(lambda t: t, lambda t: 0.25)  # a number is a constant
    sample = fm.sample_path(constant, X, 2 * X, t)
    np.testing.assert_allclose(sample.x_t, 1.25 * X)
    np.testing.assert_allclose(sample.u_t, 2 * X)


FACTORIES = {
    "sample_path": lambda: fm.sample_path(fm.cond_ot, X, X, T),
    "velocity_to_x1": lambda: fm.velocity_to_x1(fm.polynomial, T, X, X),
    "marginal_velocity": lambda: fm.marginal_velocity(fm.cosine, X),
    "divergence": lambda: fm.log_prob(halve, X, divergence=fm.exact_divergence),
    "divergence of each": lambda: each.log_prob_each(halve, X, divergence=fm.hutchinson_divergence),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_is_called_first(name):
    with pytest.raises(ValueError, match=r"got the function \w+, which makes one: \w+\("):
        FACTORIES[name]()
    with pytest.raises(ValueError, match=r"makes a sampler: logit_normal\(\)\(key, shape\)"):
        fm.logit_normal(KEY, (3,))


def test_what_is_no_path_is_refused():
    for path in (None, 3, "cond_ot", (lambda t: t,), (1.0, 2.0)):
        with pytest.raises(ValueError, match="path must be AffinePath"):
            fm.sample_path(path, X, X, T)


@pytest.mark.parametrize("solve", [fm.sample, fm.log_prob, each.sample_each, each.log_prob_each])
def test_solvers_and_controllers_are_objects(solve):
    for how, message in (
        ({"solver": diffrax.Tsit5}, r"solver .*got the class Tsit5: write Tsit5\(\)"),
        ({"solver": "dopri5"}, "solver .*got str 'dopri5'"),
        ({"stepsize_controller": diffrax.PIDController}, r"the class PIDController: write PIDC"),
        ({"stepsize_controller": 1e-3}, "stepsize_controller must be an object of Diffrax's"),
        ({"max_steps": 0}, "max_steps must be at least 1, a whole number; got 0"),
        ({"max_steps": 10.5}, "max_steps must be .* a whole number; got 10.5"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(halve, X, **how)
    if solve in (fm.sample, fm.log_prob):
        with pytest.raises(ValueError, match=r"adjoint .*write DirectAdjoint\(\)"):
            solve(halve, X, adjoint=diffrax.DirectAdjoint)
        for num_steps in (0, 2.5, "ten", np.nan):
            with pytest.raises(ValueError, match="num_steps must be at least 1, a whole number"):
                solve(halve, X, num_steps=num_steps)


ARRAYS = {
    "sample": lambda x: fm.sample(halve, x, num_steps=1),
    "log_prob": lambda x: fm.log_prob(halve, x, num_steps=1),
    "sample_and_log_prob": lambda x: fm.sample_and_log_prob(halve, x, num_steps=1),
    "sample_each": lambda x: each.sample_each(halve, x),
    "log_prob_each": lambda x: each.log_prob_each(halve, x),
    "standard_normal_log_prob": fm.standard_normal_log_prob,
    "independent": lambda x: fm.independent(KEY, x, x),
    "minibatch_ot": lambda x: fm.minibatch_ot(KEY, x, x),
    "sample_path": lambda x: fm.sample_path(fm.cond_ot(), x, x, 0.5),
    "velocity_to_x1": lambda x: fm.velocity_to_x1(fm.cond_ot(), 0.5, x, x),
    "velocity_to_score": lambda x: fm.velocity_to_score(fm.cond_ot(), [0.5, 0.2], x, x),
    "marginal_velocity": lambda x: fm.marginal_velocity(fm.cond_ot(1e-2), x)(0.5, x),
    "cfm_loss": lambda x: fm.cfm_loss(halve, fm.PathSample(0.5, x, x)),
    "exact_divergence": lambda x: EXACT(halve, 0.5, x),
    "hutchinson_divergence": lambda x: fm.hutchinson_divergence(KEY)(halve, 0.5, x),
    "bits_per_dim": lambda x: fm.bits_per_dim(x, (2,)),
    "importance_weighted_bound": dequantization.importance_weighted_bound,
    "quantize": pixels.quantize,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARRAYS)
def test_lists_and_numpys_arrays_are_taken_alike_and_without_warnings(name):
    x = [[0.5, -0.25], [0.75, 0.125]]
    want = jax.tree.leaves(ARRAYS[name](jnp.array(x, jnp.float32)))
    given = {
        "list": x,
        "float64": np.array(x),
        "Fortran's order": np.asfortranarray(np.array(x, np.float32)),
        "reversed strides": np.array(x[::-1], np.float32)[::-1],
    }
    given["read-only"] = np.array(x, np.float32)
    given["read-only"].flags.writeable = False
    if name.endswith(("sample", "prob", "each")):  # each call compiles a solve
        given = {kind: given[kind] for kind in ("list", "float64")}
    for array in given.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = jax.tree.leaves(ARRAYS[name](array))
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", sorted(ARRAYS.keys() - {"independent"}))
def test_what_is_no_array_of_floats_is_refused(name):
    for x, got in (
        (np.ones((2, 2), int), "got int"),
        (np.ones((2, 2), bool), "got bool"),
        (np.ones((2, 2), complex), "got complex"),
        (np.array([[None, 1.0]]), "must be an array of numbers; got object"),
        ([[1.0, 2.0], [1.0]], "must be an array of numbers; got list"),
        ("data", "must be an array of numbers; got str"),
        (halve, "must be an array of numbers; got the function halve. Are the arguments"),
        (None, "must be an array of numbers; got None"),
    ):
        with pytest.raises(ValueError, match=got):
            ARRAYS[name](x)


@pytest.mark.parametrize(
    "name",
    ["sample", "log_prob", "sample_each", pytest.param("minibatch_ot", marks=pytest.mark.slow)],
)
def test_a_mesh_with_explicit_axes_is_named(name):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(np.ones((4, 2), np.float32), NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match="must be on a mesh with Auto axes; got .*Explicit"):
        ARRAYS[name](x)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="with Auto axes.*axis_types="):
        jax.jit(ARRAYS[name])(x)
    if name in ("sample", "minibatch_ot"):
        auto = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        whole = NamedSharding(auto, PartitionSpec())
        ARRAYS[name](jax.device_put(np.ones((4, 2), np.float32), whole))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (3,), (2, 1), (2, 2, 2)])
def test_small_batches_and_events(shape):
    x = jnp.ones(shape)
    assert fm.minibatch_ot(KEY, x, x).shape == shape
    sample = fm.sample_path(fm.cond_ot(), x, x, jnp.zeros(shape[:1]))
    assert fm.cfm_loss(halve, sample).shape == shape[:1]
    x1, log_p = jit(lambda x: (fm.sample(halve, x), fm.log_prob(halve, x, num_steps=8)))(x)
    np.testing.assert_allclose(x1, np.full(shape, np.exp(-0.5)), rtol=1e-5)
    dim = int(np.prod(shape[1:]))
    want = -0.5 * dim * (np.e + np.log(2 * np.pi)) + 0.5 * dim
    np.testing.assert_allclose(log_p, np.full(shape[:1], want), rtol=1e-5)


def test_channels_first_are_named():
    model = models.UNet(channels=8, channel_multipliers=(1, 2), attention_resolutions=())
    with pytest.raises(ValueError, match=r"channels first.*x.transpose\(0, 2, 3, 1\)"):
        model.init(KEY, T, jnp.zeros((2, 3, 32, 32)))


@pytest.mark.slow
def test_old_and_new_keys_draw_the_same():
    def drawn(key):
        levels = jnp.arange(6, dtype=jnp.uint8).reshape(1, 6)
        return (
            fm.uniform(key, (5,)),
            fm.logit_normal()(key, (5,)),
            fm.independent(key, X, X),
            fm.minibatch_ot(key, X, X),
            pixels.dequantize(key, levels),
            fm.hutchinson_divergence(key)(halve, T, X)[1],
        )

    jax.tree.map(
        np.testing.assert_array_equal, drawn(jax.random.key(7)), drawn(jax.random.PRNGKey(7))
    )
