"""The peer's side of the CIFAR-10 U-Net: torchcfm's network and the steps of its script.

In both of torch's memory layouts; which of the two is faster depends on the processor.
"""

import copy

import numpy as np
import torch
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher
from torchcfm.models.unet.unet import UNetModelWrapper

from experiments.benchmarks.compare.points import BATCH
from experiments.benchmarks.compare.workers import Case, Options, share_arena, timed

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def network() -> UNetModelWrapper:
    return UNetModelWrapper(
        dim=(3, 32, 32),
        num_res_blocks=2,
        num_channels=128,
        channel_mult=[1, 2, 2, 2],
        num_heads=4,
        num_head_channels=64,
        attention_resolutions="16",
        dropout=0.1,
    )


def batch(layout: torch.memory_format) -> torch.Tensor:
    x = np.random.default_rng(0).uniform(-1, 1, (BATCH, 3, 32, 32)).astype(np.float32)
    return torch.from_numpy(x).to(memory_format=layout)


def training(options: Options) -> dict[str, Case]:
    share_arena()
    torch.set_num_threads(options.threads)
    return {name: _training(layout) for name, layout in LAYOUTS.items()}


def _training(layout: torch.memory_format) -> Case:
    model, x1 = network().to(memory_format=layout), batch(layout)
    average = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(n, 5000) / 5000)
    matcher = ConditionalFlowMatcher(sigma=0.0)

    def run() -> None:
        optimizer.zero_grad()
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        torch.mean((model(t, x_t) - u_t) ** 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        with torch.no_grad():
            pairs = zip(average.parameters(), model.parameters(), strict=True)
            for kept, new in pairs:
                kept.lerp_(new, 1e-4)

    return timed(run, BATCH, facts=lambda: {"parameters": _size(model)})


def forward(options: Options) -> dict[str, Case]:
    share_arena()
    torch.set_num_threads(options.threads)
    return {name: _forward(layout) for name, layout in LAYOUTS.items()}


def _forward(layout: torch.memory_format) -> Case:
    model, x, t = (
        network().to(memory_format=layout).eval(),
        batch(layout),
        torch.full((BATCH,), 0.5),
    )

    @torch.no_grad()
    def run() -> None:
        model(t, x)

    return timed(run, BATCH, facts=lambda: {"parameters": _size(model)})


def _size(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
