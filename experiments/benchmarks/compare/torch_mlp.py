"""The peer's side of the small network's training: torchcfm's MLP and matcher, torch's Adam."""

import math

import torch
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.models import MLP

from experiments.benchmarks.compare.workers import Case, Options, timed

BATCH, STEPS = 256, 200


def moons(num: int) -> torch.Tensor:
    angle, upper = math.pi * torch.rand(num), torch.rand(num) < 0.5
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle))
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle))
    return 3 * torch.stack([x, y], dim=1) - 1 + 0.6 * torch.randn(num, 2)


def training(options: Options) -> dict[str, Case]:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = MLP(dim=2, time_varying=True, w=64)
    optimizer = torch.optim.Adam(model.parameters())
    matcher = ConditionalFlowMatcher(sigma=0.0)

    def run() -> None:
        for _ in range(STEPS):
            optimizer.zero_grad()
            x1, x0 = moons(BATCH), torch.randn(BATCH, 2)
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(x0, x1)
            v = model(torch.cat([x_t, t[:, None]], dim=-1))
            torch.mean((v - u_t) ** 2).backward()
            optimizer.step()

    return {"loop": timed(run, STEPS)}
