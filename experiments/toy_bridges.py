"""The methods with noise on the way in `experiments.toy_table`: SB-CFM, SF2M and an interpolant.

With z ~ N(0, I) and x_t = t x1 + (1 - t) x0 + gamma(t) z (`fmjax.paths.bridges`):

    SB-CFM        gamma^2 = sigma^2 t (1 - t), pairs drawn from the batch's entropic plan at epsilon
                  = 2 sigma^2. One velocity regresses x1 - x0 + gamma' z, which is infinite at both
                  ends: times are drawn, and the flow is solved, between `NEAREST` and 1 - `NEAREST`
    SF2M          the same points and pairs; one network of twice the channels regresses x1 - x0 and
                  z, both bounded, at all times. Solved as a flow, between the times of SB-CFM, and
                  from end to end as the equation with the diffusion sigma
    interpolant   gamma = sigma sin^2(pi t), x0 and x1 as drawn, two fields as in SF2M; gamma' is 0
                  at both ends, and the flow is solved from end to end

Of two fields w is regressed in units of sigma, where u = w + gamma' z_hat has as much of either's
error. Otherwise w would weigh sigma^2 times as much, 49 times on the wide pair, and drown z_hat.

SB-CFM and SF2M aim at one process, the Schroedinger bridge of sigma dB between the two ends, up to
the batches whose plans make the pairs; the interpolant has the same ends and another way. Of these
flows NPE is no error: E int |u|^2 dt exceeds W2^2 by what the noise costs, and reaches it as sigma
falls only where the pairs are optimal. The equation has no such energy, its W2 alone is shown.

sigma is 1 in units of the source's deviation: 1 for a standard normal, as in the repository's
runner/configs/model/sbcfm.yaml, which pairs by Sinkhorn too, and 7 for the wide moons. At sigma = 1
from the wide moons epsilon is 2, where squared distances are in the hundreds: POT's Sinkhorn, which
torchcfm calls, did not converge in its 1,000 iterations on any of 20 batches of 128. At the table's
other sigma, 0.1, epsilon is 0.02: from the Gaussian to the moons POT's breaks down in its first
iteration, and fmjax's takes 1,000 iterations and 20 ms for a batch, twenty times as long as here.

Sources: Tong et al. 2023, arXiv 2302.00482 (SB-CFM) and 2307.03672 (SF2M); Albergo, Boffi and
Vanden-Eijnden 2023, arXiv 2303.08797 (stochastic interpolants).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from experiments import toy_data
from experiments.toy_flows import MODEL, Method
from fmjax.metrics.transport import wasserstein2

METHODS = ("SB-CFM", "SF2M", "interpolant")
NEAREST = 1e-3
"""How near to an end SB-CFM's times are drawn and its flow and SF2M's are solved."""
INSIDE = (NEAREST, 1 - NEAREST)


def interpolant(sigma: float) -> fm.BridgePath:
    """gamma(t) = sigma sin^2(pi t), whose slope is 0 at both ends."""
    return fm.BridgePath(
        alpha=lambda t: t, sigma=lambda t: 1 - t, gamma=lambda t: sigma * jnp.sin(jnp.pi * t) ** 2
    )


def whole_velocity(path: fm.BridgePath, sample: fm.BridgeSample) -> fm.PathSample:
    """The bridge's own velocity alpha' x1 + sigma' x0 + gamma' z as the target."""
    slope = jax.jvp(path.gamma, (sample.mean.t,), (jnp.ones_like(sample.mean.t),))[1]
    return sample.mean._replace(u_t=sample.mean.u_t + slope[:, None] * sample.noise.u_t)


def fields(path: fm.BridgePath, params: Any, t: jax.Array, x: jax.Array) -> Any:
    """(w / sigma, z_hat) of one network of twice the channels."""
    both: Any = MODEL.apply(params, t, jnp.tile(x, 2))  # as many channels come out as go in
    w, r = jnp.split(both, 2, axis=1)
    shape = path.gamma(t) / path.gamma(jnp.array(0.5))
    return w, jnp.reshape(shape, (-1, 1)) * r  # z_hat is 0 at both ends, as gamma is


def split(path: fm.BridgePath, sigma: float, params: Any) -> tuple[fm.Velocity, fm.Velocity]:
    """w and z_hat as two velocities."""
    both = functools.partial(fields, path, params)
    return (lambda t, x: sigma * both(t, x)[0]), (lambda t, x: both(t, x)[1])


def draw(
    path: fm.BridgePath, times: tuple[float, float], key: jax.Array, pair: tuple[Any, Any]
) -> fm.BridgeSample:
    key_t, key_noise = jax.random.split(key)
    t0, t1 = times
    t = t0 + (t1 - t0) * fm.uniform(key_t, pair[1].shape[:1])
    return fm.sample_bridge(key_noise, path, *pair, t)


@functools.cache
def make(name: str, sigma: float) -> Method:
    """A method of the table, at this noise."""
    path = interpolant(sigma) if name == "interpolant" else fm.brownian_bridge(sigma)
    if name == "SB-CFM":

        def velocity_loss(params: Any, key: jax.Array, pair: tuple[Any, Any]) -> jax.Array:
            target = whole_velocity(path, draw(path, INSIDE, key, pair))
            return jnp.mean(fm.cfm_loss(functools.partial(MODEL.apply, params), target))

        return Method(toy_data.independent, velocity_loss, MODEL.apply, times=INSIDE)

    def fields_loss(params: Any, key: jax.Array, pair: tuple[Any, Any]) -> jax.Array:
        mean, noise = draw(path, (0.0, 1.0), key, pair)
        sample = fm.BridgeSample(mean._replace(u_t=mean.u_t / sigma), noise)
        return jnp.mean(fm.bridge_loss(functools.partial(fields, path, params), sample))

    def flow(params: Any, t: jax.Array, x: jax.Array) -> jax.Array:
        return fm.bridge_flow(path, *split(path, sigma, params))(t, x)

    times = INSIDE if name == "SF2M" else (0.0, 1.0)
    return Method(toy_data.independent, fields_loss, flow, dim=4, times=times)


def entropic(
    seeds: Sequence[int], chunks: Iterable[tuple[Any, Any]], sigma: float
) -> Iterator[tuple[Any, Any]]:
    """Chunks (x0, x1), `[steps, seeds, batch, 2]`, paired by entropic plans: x1 stays."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(jnp.array(seeds))
    for number, (x0, x1) in enumerate(chunks):
        yield pair_chunk(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x0, x1, sigma), x1


@functools.partial(jax.jit, static_argnames="sigma")
def pair_chunk(keys: jax.Array, x0: jax.Array, x1: jax.Array, sigma: float) -> jax.Array:
    """x0 `[steps, seeds, batch, 2]`, drawn by the plan of each batch; keys `[seeds]`."""
    coupling = fm.sinkhorn(2 * sigma**2, max_iterations=20_000)
    # One after another: side by side, all would take as many iterations as the slowest.
    keys = jax.vmap(lambda key: jax.random.split(key, len(x0)), out_axes=1)(keys).reshape(-1)
    batches = keys, *(x.reshape(-1, *x.shape[2:]) for x in (x0, x1))
    return jax.lax.map(lambda batch: coupling(*batch), batches).reshape(x0.shape)


@functools.partial(jax.jit, static_argnames=("seeds", "sigma"))
def sample_all(seeds: tuple[int, ...], params: Any, x0: jax.Array, sigma: float) -> jax.Array:
    """SF2M's equation solved to t = 1 in 100 Euler steps: stacked params, x0 `[seeds, n, 2]`."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 2))(jnp.array(seeds))
    path = fm.brownian_bridge(sigma)

    def diffusion(t: jax.Array) -> float:
        del t
        return sigma

    def sample(key: jax.Array, params: Any, x0: jax.Array) -> jax.Array:
        drift = fm.bridge_drift(path, *split(path, sigma, params), diffusion)
        return fm.sample_sde(key, drift, diffusion, x0, num_steps=100)

    return jax.vmap(sample)(keys, params, x0)


def distances(seeds: tuple[int, ...], params: Any, tests: np.ndarray, sigma: float) -> list[float]:
    """W2 from the solutions of SF2M's equation to the test points, `[seeds, 2, n, 2]`."""
    samples = np.asarray(sample_all(seeds, params, tests[:, 0], sigma))
    return [wasserstein2(x, y) for x, y in zip(samples, tests[:, 1], strict=True)]
