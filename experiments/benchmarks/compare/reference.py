"""The two-dimensional flow solved tightly in float64, by numpy and SciPy: neither side's own code.

With h_0 = (x, t), h_n = s(W_n h_{n-1} + b_n), s(z) = z / (1 + exp(-z)), the divergence is the sum
over i of d u_i / d x_i, carried forwards with each layer.
"""

import numpy as np
from scipy.integrate import solve_ivp

Layers = list[tuple[np.ndarray, np.ndarray]]
_TOLERANCE = 1e-10


def velocity(layers: Layers, t: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u `[num, 2]` and its divergence `[num]`."""
    h = np.concatenate([x, np.full((len(x), 1), t)], axis=1)
    tangents = np.broadcast_to(np.eye(3)[:2, None], (2, len(x), 3))
    for n, (kernel, bias) in enumerate(layers):
        z, tangents = h @ kernel + bias, tangents @ kernel
        if n < len(layers) - 1:
            gate = 1 / (1 + np.exp(-z))
            h, tangents = z * gate, tangents * (gate * (1 + z * (1 - gate)))
        else:
            h = z
    return h, tangents[0, :, 0] + tangents[1, :, 1]


def _solve(layers: Layers, x: np.ndarray, t0: float, t1: float) -> tuple[np.ndarray, np.ndarray]:
    layers = [(kernel.astype(np.float64), bias.astype(np.float64)) for kernel, bias in layers]
    size = x.size

    def field(t: float, y: np.ndarray) -> np.ndarray:
        u, div = velocity(layers, t, y[:size].reshape(x.shape))
        return np.concatenate([u.ravel(), div])

    start = np.concatenate([x.astype(np.float64).ravel(), np.zeros(len(x))])
    solved = solve_ivp(field, (t0, t1), start, "DOP853", rtol=_TOLERANCE, atol=_TOLERANCE)
    if not solved.success:
        raise RuntimeError(solved.message)
    end = solved.y[:, -1]
    return end[:size].reshape(x.shape), end[size:]


def sample(layers: Layers, x0: np.ndarray) -> np.ndarray:
    return _solve(layers, x0, 0.0, 1.0)[0]


def log_prob(layers: Layers, x1: np.ndarray) -> np.ndarray:
    x0, integral = _solve(layers, x1, 1.0, 0.0)
    return -0.5 * np.sum(x0**2, axis=1) - np.log(2 * np.pi) + integral


def errors(got: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    difference = np.abs(got - exact)
    return {"rms": float(np.sqrt(np.mean(difference**2))), "largest": float(difference.max())}
