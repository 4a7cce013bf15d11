"""The peers' side of the solves: torchdiffeq's dopri5, and flow_matching's likelihood with it."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.compare import points
from experiments.benchmarks.compare.workers import Case, Options, timed

TOLERANCE = 1e-5


class Velocity(torch.nn.Module):
    """torchcfm's MLP with SiLU, under the weights that both sides share; counts its calls."""

    def __init__(self, options: Options):
        super().__init__()
        layers = []
        for kernel, bias in points.read_weights(options.folder):
            layers.append(linear := torch.nn.Linear(*kernel.shape))
            linear.weight.data = torch.from_numpy(kernel.T.copy())
            linear.bias.data = torch.from_numpy(bias)
            layers.append(torch.nn.SiLU())
        self.net, self.calls = torch.nn.Sequential(*layers[:-1]), 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(torch.cat([x, t.expand(x.shape[0], 1)], dim=1))


def sampling(options: Options) -> dict[str, Case]:
    from torchdiffeq import odeint

    torch.set_num_threads(options.threads)
    velocity, times = Velocity(options), torch.tensor([0.0, 1.0])

    @torch.no_grad()
    def solve(x0: torch.Tensor) -> torch.Tensor:
        field = lambda t, x: velocity(x, t)  # noqa: E731
        return odeint(field, x0, times, rtol=TOLERANCE, atol=TOLERANCE, method="dopri5")[-1]

    def case(num: int) -> Case:
        result = options.folder / f"sampling_{num}_{options.side}.npy"
        return _case(solve, velocity, points.normal(num), 4 if num > 100 else 10, result)

    return {str(num): case(num) for num in (1024, 16)}


def log_density(options: Options) -> dict[str, Case]:
    torch.set_num_threads(options.threads)
    velocity = Velocity(options)
    result = options.folder / f"log_density_1024_{options.side}.npy"
    return {"1024": _case(_likelihood(velocity), velocity, points.moons(1024), 1, result)}


def image_log_density(options: Options) -> dict[str, Case]:
    """Images under any network at all: the peer's exact divergence takes vectors."""

    class Images(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.calls = torch.nn.Conv2d(1, 1, 3, padding=1), 0

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * t

    torch.set_num_threads(options.threads)
    velocity = Images()
    images = np.zeros((16, 1, 8, 8), np.float32)
    return {"16": _case(_likelihood(velocity), velocity, images, 1)}


def _likelihood(velocity: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    from flow_matching.solver import ODESolver

    solver = ODESolver(velocity_model=velocity)

    def source(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        return -0.5 * (x**2).sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def solve(x1: torch.Tensor) -> torch.Tensor:
        return solver.compute_likelihood(
            x_1=x1,
            log_p0=source,
            step_size=None,
            method="dopri5",
            atol=TOLERANCE,
            rtol=TOLERANCE,
            exact_divergence=True,
        )[1]

    return solve


def _case(solve: Any, velocity: Any, x: np.ndarray, num: int, result: Any = None) -> Case:
    start = torch.from_numpy(x)

    def run() -> None:
        for _ in range(num):
            solve(start.clone())

    def facts() -> dict[str, Any]:
        velocity.calls = 0
        value = solve(start.clone())
        if result is not None:
            np.save(result, value.numpy())
        return {"evaluations": velocity.calls, "solver": "dopri5"}

    return timed(run, num, facts=facts)
