"""The table of `experiments.benchmarks.single_cell` from torchcfm's own code, on the same files.

    FMJAX_DATA_DIR=... OMP_NUM_THREADS=1 python -m experiments.benchmarks.single_cell_torchcfm

in an environment with the extra `benchmarks` (torch, torchcfm, torchdyn, torchsde, POT). It trains
no network of JAX's: files, whitening and the distance are `fmjax`'s, so that all else is compared.
torchcfm's matchers, exact and entropic and unbalanced minibatch plans, MLP (SELU, time beside the
coordinates), torch's AdamW, torchdyn's Euler and torchsde's. The protocol is that of the other
command; as in the published code time is k + s, an interval that leaves one out is twice as long,
and its slope is halved.

Score and flow have a network each, as in torchcfm's notebooks: the score's output is that of the
drift g^2 s / 2, on the scale of compute_lambda. The sampler draws pairs with replacement, which
leaves out 37 % of a batch, and from numpy's global generator.

A run (file, time, method, seed) that is finished has a file of its own in the run folder: started
again, the command does what is missing, then writes results/single_cell_torchcfm.json.
"""

import argparse
import math
import os
import pathlib
import time
import types
import warnings
from typing import Any

import numpy as np
import torch
import torchsde
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
)
from torchcfm.models import MLP
from torchcfm.optimal_transport import OTPlanSampler
from torchcfm.utils import torch_wrapper
from torchdyn.core import NeuralODE

from experiments.benchmarks.toy_table_torchcfm import read, record, write
from fmjax.tasks import intervals, snapshots

RESULTS = pathlib.Path(__file__).parent / "results" / "single_cell_torchcfm.json"
FILES = {"emt": (1, 2), "mouse_hematopoiesis": (1,), "simulation_gene_data": (1, 2, 3)}
METHODS = ("i-cfm", "ot-cfm", "unbalanced", "sf2m-exact", "sf2m-entropic")
PACKAGES = ("torch", "torchcfm", "torchdyn", "torchsde", "POT", "numpy")
SIGMA, BRIDGE, EPSILON, TAU = 0.1, 0.5, 0.5, 5.0


class Unbalanced(ConditionalFlowMatcher):
    """Lines between pairs of torchcfm's unbalanced plan, which keeps the later cells' weights."""

    def __init__(self, sigma: float):
        super().__init__(sigma)
        self.sampler = OTPlanSampler("unbalanced", reg=EPSILON, reg_m=(TAU, math.inf))

    def sample_location_and_conditional_flow(self, x0: Any, x1: Any, *args: Any, **kw: Any) -> Any:
        return super().sample_location_and_conditional_flow(
            *self.sampler.sample_plan(x0, x1), *args, **kw
        )


def matcher(method: str) -> Any:
    if method.startswith("sf2m"):
        how = "exact" if method == "sf2m-exact" else "sinkhorn"
        return SchrodingerBridgeConditionalFlowMatcher(BRIDGE, ot_method=how)
    kinds = {
        "i-cfm": ConditionalFlowMatcher,
        "ot-cfm": ExactOptimalTransportConditionalFlowMatcher,
        "unbalanced": Unbalanced,
    }
    return kinds[method](SIGMA)


class Equation(torch.nn.Module):
    """dx = (flow + score) dt + sigma dB for torchsde, in the interval's own time s."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, flow: Any, score: Any, begin: float, width: float):
        super().__init__()
        self.flow, self.score, self.begin, self.width = flow, score, begin, width

    def f(self, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        at = torch.cat([x, (self.begin + self.width * s).repeat(len(x))[:, None]], dim=1)
        return self.width * self.flow(at) + self.score(at)

    def g(self, s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, BRIDGE)


def train(data: Any, method: str, args: argparse.Namespace) -> tuple[Any, Any]:
    """The networks of flow and score; the latter None without bridges."""
    flows, dim = matcher(method), data.cells[0].shape[1]
    flow = MLP(dim=dim, time_varying=True, w=64)
    score = MLP(dim=dim, time_varying=True, w=64) if method.startswith("sf2m") else None
    networks = [flow] + ([score] if score is not None else [])
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-5)
    cells, kept = [torch.from_numpy(x) for x in data.cells], data.trained_on
    for _ in range(args.num_steps):
        drawn = []
        for k, after in zip(kept[:-1], kept[1:], strict=True):
            x0, x1 = (
                cells[j][torch.randint(len(cells[j]), (args.batch_size,))] for j in (k, after)
            )
            s, x, u, noise = flows.sample_location_and_conditional_flow(x0, x1, return_noise=True)
            width = after - k
            scale = flows.compute_lambda(s)[:, None] if score is not None else s[:, None]
            drawn.append((torch.cat([x, (k + width * s)[:, None]], dim=1), u / width, noise, scale))
        at, u, noise, scale = (torch.cat(part) for part in zip(*drawn, strict=True))
        loss = torch.mean((flow(at) - u) ** 2)
        if score is not None:
            loss = loss + torch.mean((scale * score(at) + noise) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow, score


def run(file: str, leave_out: int, method: str, seed: int, args: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    path = pathlib.Path(os.environ["FMJAX_DATA_DIR"], "singlecell_time", f"{file}.csv")
    flags: Any = types.SimpleNamespace(data=path, leave_out=leave_out, num_dims=None, whiten="all")
    data = snapshots.open_snapshots(flags)
    began = time.perf_counter()
    flow, score = train(data, method, args)
    seconds, k = time.perf_counter() - began, leave_out
    x = torch.from_numpy(data.cells[k - 1])
    with torch.no_grad():
        node = NeuralODE(torch_wrapper(flow), solver="euler")
        found = {"flow": node.trajectory(x, t_span=torch.linspace(k - 1, k, 101))[-1]}
        if score is not None:
            equation = Equation(flow, score, k - 1, 2.0)
            s = torch.tensor([0.0, 0.5])
            found["sde"] = torchsde.sdeint(equation, x, s, method="euler", dt=0.005)[-1]
    names = {"file": file, "leave_out": leave_out, "method": method, "seed": seed}
    figures = intervals.left_out_figures(data, {name: y.numpy() for name, y in found.items()})
    figures = {name: figures[name] for name in ("w1", "w1_sde") if name in figures}
    return names | figures | {"training_seconds": round(seconds, 2)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.single_cell_torchcfm")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/single_cell_torchcfm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--num-steps", type=int, default=1_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # networks this small are slower on two
    warnings.filterwarnings("ignore", message="Sinkhorn did not converge")
    args.workdir.mkdir(parents=True, exist_ok=True)
    protocol = {"num_steps": args.num_steps, "batch_size": args.batch_size, "sigma": SIGMA,
                "bridge_sigma": BRIDGE, "epsilon": EPSILON, "tau0": TAU}  # fmt: skip
    for seed in args.seeds:
        for method in args.methods:
            for file, k in ((file, k) for file, times in FILES.items() for k in times):
                path = args.workdir / f"{file}-{k}-{method}-{seed}.json"
                if not path.exists():
                    found = run(file, k, method, seed, args)
                    write(path, {"protocol": protocol, "run": found})
                print(path.read_text(), flush=True)
    kept = sorted(args.workdir.glob("*.json"))  # those of earlier commands too
    runs = [read(path, protocol) for path in kept]
    write(args.output, record("single_cell_torchcfm", PACKAGES, protocol, runs))


if __name__ == "__main__":
    main()
