"""Between the snapshots of a population: pairs, paths, and the time that was left out.

Between neighbouring times t_k < t_l that are trained on, cells x_k and x_l are paired, and with s
uniform in [0, 1] and t = t_k + s (t_l - t_k) a point lies on

    a line      x_t = (1 - s) x_k + s x_l + sigma z,                 u_t = (x_l - x_k) / (t_l - t_k)
    a bridge    x_t = (1 - s) x_k + s x_l + sigma sqrt(s (1 - s)) z,

every interval as often as any other. On lines one velocity is learned. On bridges it is two fields
(`fm.bridge_loss`), in one network: the mean slope w, in the unit of t, and z_hat. The equation of a
bridge is solved in the interval's own time s. With time k left out the interval from k - 1 to k + 1
is twice as long, and its reference process sigma dB is one in s, as in the published code.

What was left out is predicted from the true cells at k - 1: they are moved to t_k by 100 Euler
steps, along the flow or with the noise of the equation, and compared with all cells at t_k by the
1-Wasserstein distance.

Sources: Tong et al. 2023, arXiv 2302.00482 (lines) and arXiv 2307.03672 (bridges).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import fmjax as fm
from fmjax import metrics
from fmjax.tasks.snapshots import Snapshots

EULER_STEPS = 100


class Method(NamedTuple):
    """One way to learn how the population moves.

    Attributes:
      init: `key -> params`.
      draw: `(key, pairs) -> sample`, all that is random in a step, of pairs `[batch, intervals, 2,
        D]`.
      loss: `(params, sample) -> [intervals * batch]`.
      velocity: `params -> velocity` of the flow, at all times.
      moved: `(params, key) -> {sampler: [n, D]}`, the cells before the left-out time moved to it.
    """

    init: Callable[[jax.Array], Any]
    draw: Callable[[jax.Array, jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    velocity: Callable[[Any], fm.Velocity]
    moved: Callable[[Any, jax.Array], dict[str, jax.Array]]


def on_lines(snapshots: Snapshots, model: nn.Module, coupling: fm.Coupling, sigma: float) -> Method:
    """One velocity, on lines with noise `sigma`.

    Raises:
      ValueError: if `sigma` is negative or not finite.
    """
    if not 0 <= sigma < np.inf:
        raise ValueError(f"--sigma must be zero or more; got {sigma}.")
    ts, dim = trained_times(snapshots), snapshots.cells[0].shape[1]

    def velocity(params: Any) -> fm.Velocity:
        return functools.partial(model.apply, params)  # pyright: ignore[reportReturnType]

    return Method(
        init=lambda key: model.init(key, jnp.zeros(()), jnp.zeros((1, dim))),
        draw=lambda key, x: sample_lines(key, x, ts, coupling, sigma),
        loss=lambda params, sample: fm.cfm_loss(velocity(params), sample),
        velocity=velocity,
        moved=lambda params, key: {"flow": move(snapshots, velocity(params))},
    )


def on_bridges(
    snapshots: Snapshots, model: nn.Module, coupling: fm.Coupling, sigma: float
) -> Method:
    """Two fields, on Brownian bridges of the reference sigma dB in each interval's time.

    Raises:
      ValueError: if `sigma` is not positive and finite.
    """
    path, ts = fm.brownian_bridge(sigma), trained_times(snapshots)
    dim = snapshots.cells[0].shape[1]

    def network(params: Any, t: jax.Array, x: jax.Array) -> Any:
        both: Any = model.apply(params, t, jnp.tile(x, 2))  # as many channels as it gets
        return jnp.split(both, 2, axis=1)

    def fields(params: Any) -> fm.BridgeFields:
        return two_fields(functools.partial(network, params), ts, path)

    def velocity(params: Any) -> fm.Velocity:
        return bridge_velocity(functools.partial(network, params), ts, sigma)

    def moved(params: Any, key: jax.Array) -> dict[str, jax.Array]:
        noisy = move_by_noise(snapshots, fields(params), path, sigma, key)
        return {"flow": move(snapshots, velocity(params)), "sde": noisy}

    return Method(
        init=lambda key: model.init(key, jnp.zeros(()), jnp.zeros((1, 2 * dim))),
        draw=lambda key, x: sample_bridges(key, x, ts, coupling, path),
        loss=lambda params, sample: fm.bridge_loss(fields(params), sample),
        velocity=velocity,
        moved=moved,
    )


def trained_times(snapshots: Snapshots) -> jax.Array:
    """Those of the snapshots that are trained on, `[intervals + 1]`."""
    return jnp.asarray(snapshots.ts[snapshots.trained_on], jnp.float32)


def shuffled(coupling: fm.Coupling) -> fm.Coupling:
    """The coupling of a batch whose earlier cells are put into a new order first."""

    def fresh(key: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
        key_order, key_pair = jax.random.split(key)
        return coupling(key_pair, jax.random.permutation(key_order, x0), x1)

    return fresh


def sample_lines(
    key: jax.Array, pairs: jax.Array, ts: jax.Array, coupling: fm.Coupling, sigma: float
) -> fm.PathSample:
    """Points on lines between neighbouring snapshots, all intervals one after the other.

    Args:
      key: random key.
      pairs: a batch of starts and stops, `[batch, intervals, 2, D]`.
      ts: the times of the snapshots, `[intervals + 1]`, increasing.
      coupling: `(key, x0, x1) -> x0`, applied to each interval's batch.
      sigma: the noise on the path.

    Returns:
      A `PathSample` of `intervals * batch` points.
    """
    samples = []
    for key_noise, x0, x1, s, t, width in _each(key, pairs, ts, coupling):
        on = fm.sample_path(fm.cond_ot(), x0, x1, s)
        noise = sigma * jax.random.normal(key_noise, x1.shape)
        samples.append(fm.PathSample(t, on.x_t + noise, on.u_t / width))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *samples)


def sample_bridges(
    key: jax.Array, pairs: jax.Array, ts: jax.Array, coupling: fm.Coupling, path: fm.BridgePath
) -> fm.BridgeSample:
    """Points on bridges, as `sample_lines`; `path` is that of one interval, in its own time s."""
    samples = []
    for key_noise, x0, x1, s, t, width in _each(key, pairs, ts, coupling):
        mean, noise = fm.sample_bridge(key_noise, path, x0, x1, s)
        mean = mean._replace(t=t, u_t=mean.u_t / width)
        samples.append(fm.BridgeSample(mean, noise._replace(t=t)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *samples)


def _each(key: jax.Array, pairs: jax.Array, ts: jax.Array, coupling: fm.Coupling) -> Iterator[Any]:
    for k, key_interval in enumerate(jax.random.split(key, pairs.shape[1])):
        key_pair, key_s, key_noise = jax.random.split(key_interval, 3)
        x0, x1 = pairs[:, k, 0], pairs[:, k, 1]
        s, width = fm.uniform(key_s, x1.shape[:1]), ts[k + 1] - ts[k]
        yield key_noise, coupling(key_pair, x0, x1), x1, s, ts[k] + s * width, width


def two_fields(network: fm.BridgeFields, ts: jax.Array, path: fm.BridgePath) -> fm.BridgeFields:
    """(w, z_hat) of a network's (w, r), with z_hat = gamma r, which is 0 at every snapshot."""

    def fields(t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, r = network(t, x)
        return w, path.gamma(_own_time(t, ts)[0]).reshape(-1, 1) * r

    return fields


def bridge_velocity(network: fm.BridgeFields, ts: jax.Array, sigma: float) -> fm.Velocity:
    """u = w + gamma' z_hat = w + (gamma^2)' r / 2, which is finite at the snapshots too."""

    def velocity(t: jax.Array, x: jax.Array) -> jax.Array:
        s, width = _own_time(t, ts)
        _, slope = jax.jvp(lambda s: sigma**2 * s * (1 - s), (s,), (1 / width,))
        w, r = network(t, x)
        return w + slope.reshape(-1, 1) / 2 * r

    return velocity


def _own_time(t: jax.Array, ts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """s in its interval, and the interval's width, for t in the shape of t."""
    k = jnp.clip(jnp.searchsorted(ts, t, side="right") - 1, 0, len(ts) - 2)
    width = ts[k + 1] - ts[k]
    return jnp.clip((t - ts[k]) / width, 0, 1), width


def move(snapshots: Snapshots, velocity: fm.Velocity) -> jax.Array:
    """The cells before the left-out time, moved to it by the flow of a velocity."""
    k, ts = snapshots.left_out, snapshots.ts
    return fm.sample(
        velocity, jnp.asarray(snapshots.cells[k - 1]), t0=float(ts[k - 1]), t1=float(ts[k]),
        solver=diffrax.Euler(), num_steps=EULER_STEPS,
    )  # fmt: skip


def move_by_noise(
    snapshots: Snapshots, fields: fm.BridgeFields, path: fm.BridgePath, sigma: float, key: jax.Array
) -> jax.Array:
    """The same by the equation of a bridge with the noise of its reference, in its own time s."""
    k = snapshots.left_out
    begin, there, end = map(float, snapshots.ts[k - 1 : k + 2])
    width = end - begin

    def w(s: jax.Array, x: jax.Array) -> jax.Array:
        return width * fields(begin + s * width, x)[0]

    def z_hat(s: jax.Array, x: jax.Array) -> jax.Array:
        return fields(begin + s * width, x)[1]

    return fm.sample_sde(
        key, fm.bridge_drift(path, w, z_hat, lambda s: sigma), lambda s: sigma,
        jnp.asarray(snapshots.cells[k - 1]), t1=(there - begin) / width, num_steps=EULER_STEPS,
    )  # fmt: skip


def left_out_figures(
    snapshots: Snapshots,
    moved: dict[str, Any],
    grown: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """W_1 between the cells that are predicted at the left-out time and those that are there.

    Args:
      snapshots: the cells.
      moved: the predictions, by sampler.
      grown: rows of the flow's and their weights, for one more figure; None for none.

    Returns:
      "w1" of the flow; "w1_sde" and "w1_weighted" where there are such; "w1_still", of the cells of
      the time before as they are, which a flow must beat; and the protocol in words.
    """
    k = snapshots.left_out
    before, there = snapshots.cells[k - 1], snapshots.cells[k]
    figures: dict[str, Any] = {
        "w1" if name == "flow" else f"w1_{name}": metrics.wasserstein1(x, there)
        for name, x in moved.items()
    }
    if grown is not None:
        rows, weights = grown
        x = np.asarray(moved["flow"])[rows]
        figures["w1_weighted"] = metrics.wasserstein1(x, there, weights=weights)
    return figures | {
        "w1_still": metrics.wasserstein1(before, there),
        "w1_method": (
            f"time {k} left out; {len(before)} true cells of time {k - 1} moved by {EULER_STEPS} "
            f"Euler steps, exact transport to all {len(there)} cells of time {k}; whitened by "
            f"{snapshots.facts['whitened by']}"
        ),
    }
