"""The peer's side of the pairing: torchcfm's sampler, that is cost, POT's `emd` and the draw."""

import warnings
from typing import Any

import torch
from torchcfm.optimal_transport import OTPlanSampler

from experiments.benchmarks.compare import points
from experiments.benchmarks.compare.workers import Case, Options, timed


def pairing(options: Options) -> dict[str, Case]:
    torch.set_num_threads(options.threads)
    return {str(num): _case(num, options) for num in points.PAIRING}


def _case(num: int, options: Options) -> Case:
    x0, x1 = (torch.from_numpy(x) for x in points.pairing_batch(num, options.folder))
    sampler = OTPlanSampler("exact")
    calls = max(1, 1024 // num)

    def run() -> None:
        for _ in range(calls):
            sampler.sample_plan(x0, x1)

    def facts() -> dict[str, Any]:
        """The cost of the plan; `emd` says in a warning when it stopped before the optimum."""
        with warnings.catch_warnings(record=True) as said:
            plan = torch.from_numpy(sampler.get_map(x0, x1)).double()
        cost = torch.cdist(x0.double(), x1.double()) ** 2
        found = {"mean cost": float((plan * cost).sum())}
        return found | ({"warning": str(said[0].message)[:60]} if said else {})

    return timed(run, calls, facts=facts)
