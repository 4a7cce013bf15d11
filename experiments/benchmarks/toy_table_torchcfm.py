"""The table of `experiments.toy_table` from torchcfm's own code, on this machine.

    OMP_NUM_THREADS=1 python -m experiments.benchmarks.toy_table_torchcfm

in an environment with the extra `benchmarks` (torch, torchcfm, which brings torchdyn, and POT). It
imports no JAX.
torchcfm's matchers, MLP (SELU, time beside the coordinates), exact-OT sampler and 2-Wasserstein
distance, torch's AdamW and torchdyn's Euler solver; data from scikit-learn and torchdyn, scaled as
the repository's own runner scales them. Protocol and sources: docstring of `experiments.toy_table`.

SF2M follows arXiv 2307.03672 with torchcfm's Schroedinger-bridge matcher, told to pair by Sinkhorn
(its default is exact assignment; epsilon is 2 sigma^2 by itself) and its weight lambda(t) of the
score: one MLP regresses the bridge's velocity, another one sigma^2 / 2 times the score, and the
Schroedinger bridge is solved with the sum of both as its drift, in 100 Euler-Maruyama steps. The
two share nothing, so that the first one alone is SB-CFM: its row is that of the same training.

A run (data pair, method, seed) that is finished has a file of its own in the run folder: started
again, the command does what is missing, then writes results/toy_table_torchcfm.json.

Two facts about torchcfm 1.0.7 that matter here. Its OT sampler draws the batch's pairs from the
plan with replacement: 63 % of a batch is used, some pairs twice. And it draws them from numpy's
global generator, so that torch's seed alone doesn't repeat a run; this script seeds both.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import make_moons, make_s_curve
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    SchrodingerBridgeConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
)
from torchcfm.models import MLP
from torchcfm.optimal_transport import wasserstein
from torchcfm.utils import torch_wrapper
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_gaussians

RESULTS = pathlib.Path(__file__).parent / "results" / "toy_table_torchcfm.json"
METHODS = {
    "OT-CFM": ExactOptimalTransportConditionalFlowMatcher,
    "I-CFM": ConditionalFlowMatcher,
    "FM": TargetConditionalFlowMatcher,
    "SF2M": SchrodingerBridgeConditionalFlowMatcher,
}
PACKAGES = ("torch", "torchcfm", "torchdyn", "POT", "numpy", "scikit-learn")


def gaussian(num: int) -> np.ndarray:
    return np.random.standard_normal((num, 2))


def ring(num: int) -> np.ndarray:
    """Eight Gaussians of deviation 1 at radius 5."""
    x, _ = generate_gaussians(-(-num // 8), n_gaussians=8, radius=5, std_gaussians=1, noise=1e-4)
    return np.random.permutation(x.numpy())[:num]


def wide_ring(num: int) -> np.ndarray:
    """Eight Gaussians of deviation 1.5 at radius 12."""
    angles = np.random.randint(8, size=num) * np.pi / 4
    centres = 4.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return 3.0 * (centres + 0.5 * np.random.standard_normal((num, 2)))


def moons(num: int) -> np.ndarray:
    return 2.0 * make_moons(num, noise=0.05)[0] - [1.0, 0.0]


def wide_moons(num: int) -> np.ndarray:
    x, _ = make_moons(num, noise=0.1)
    return 7.0 * (x - x.mean()) / x.std()


def s_curve(num: int) -> np.ndarray:
    return 1.5 * make_s_curve(num, noise=0.05)[0][:, [0, 2]]


PAIRS = {
    "gaussian-8gaussians": (gaussian, ring),
    "moons-8gaussians": (wide_moons, wide_ring),
    "gaussian-moons": (gaussian, moons),
    "gaussian-scurve": (gaussian, s_curve),
}


DEVIATIONS = {gaussian: 1.0, wide_moons: 7.0}  # of the sources


class WithEnergy(torch.nn.Module):
    """d/dt (x, e) = (v, |v|^2) for torchdyn, on states `[batch, 3]`."""

    def __init__(self, velocity: torch.nn.Module):
        super().__init__()
        self.velocity = velocity

    def forward(self, t: torch.Tensor, state: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        u = self.velocity(t, state[:, :2])
        return torch.cat([u, (u**2).sum(1, keepdim=True)], dim=1)


def split(sampler: Any, num_train: int, num_test: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = np.random.permutation(sampler(num_train + num_test)).astype(np.float32)
    return torch.from_numpy(x[:num_train]), torch.from_numpy(x[num_train:])


def train(flow: Any, source: Any, target: torch.Tensor, args: argparse.Namespace) -> list[MLP]:
    """The velocity, and for SF2M the score; without a `source` x0 is standard normal."""
    scored = isinstance(flow, SchrodingerBridgeConditionalFlowMatcher)
    models = [MLP(dim=2, time_varying=True, w=64) for _ in range(1 + scored)]
    parameters = [parameter for model in models for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-5)
    for _ in range(args.num_steps):
        x1 = target[torch.randint(len(target), (args.batch_size,))]
        x0 = torch.randn_like(x1)
        if source is not None:
            x0 = source[torch.randint(len(source), (args.batch_size,))]
        t, x_t, u_t, noise = flow.sample_location_and_conditional_flow(x0, x1, return_noise=True)
        outputs = [model(torch.cat([x_t, t[:, None]], dim=-1)) for model in models]
        loss = torch.mean((outputs[0] - u_t) ** 2)
        if scored:
            loss = loss + torch.mean((flow.compute_lambda(t)[:, None] * outputs[1] + noise) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return models


def solve_sde(models: list[MLP], sigma: float, x: torch.Tensor, num_steps: int = 100) -> Any:
    """Euler and Maruyama's x(1) of dx = (u + sigma^2 / 2 score) dt + sigma dB."""
    step = 1 / num_steps
    for i in range(num_steps):
        at = torch.cat([x, torch.full((len(x), 1), i * step)], dim=1)
        drift = models[0](at) + models[1](at)
        x = x + step * drift + sigma * math.sqrt(step) * torch.randn_like(x)
    return x


def run(pair: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    np.random.seed(seed)
    (source, x0), (target, x1) = (split(s, args.num_train, args.num_test) for s in PAIRS[pair])
    began = time.perf_counter()
    sigma, options = args.sigma, {}
    if method == "SF2M":
        sigma, options = args.bridge_sigma * DEVIATIONS[PAIRS[pair][0]], {"ot_method": "sinkhorn"}
    source = None if PAIRS[pair][0] is gaussian else source
    models = train(METHODS[method](sigma=sigma, **options), source, target, args)
    seconds = time.perf_counter() - began
    node = NeuralODE(WithEnergy(torch_wrapper(models[0])), solver="euler")
    state = torch.cat([x0, torch.zeros(len(x0), 1)], dim=1)
    with torch.no_grad():
        end = node.trajectory(state, t_span=torch.linspace(0, 1, 101))[-1]
    result = {
        "pair": pair,
        "method": method,
        "seed": seed,
        "wasserstein2": wasserstein(end[:, :2], x1, power=2),
        "path_energy": end[:, 2].double().mean().item(),
        "training_seconds": round(seconds, 2),
        "date": datetime.date.today().isoformat(),
    }
    if method == "SF2M":
        with torch.no_grad():
            sample = solve_sde(models, sigma, x0)
        result["sde_wasserstein2"] = wasserstein(sample, x1, power=2)
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.toy_table_torchcfm")
    parser.add_argument("--workdir", type=pathlib.Path, default="runs/toy_table_torchcfm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--num-steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-train", type=int, default=10_000)
    parser.add_argument("--num-test", type=int, default=1_000)
    parser.add_argument("--sigma", type=float, default=0.1)
    parser.add_argument("--bridge-sigma", type=float, default=1.0)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    return parser.parse_args()


def write(path: pathlib.Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def record(
    name: str, packages: tuple[str, ...], protocol: dict[str, Any], runs: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a driver of torchcfm's writes: where and by what its runs were made, and the runs."""
    return {
        "experiment": name,
        "command": f"python -m experiments.benchmarks.{name}",
        "date": datetime.date.today().isoformat(),
        "hardware": f"one core of a shared {platform.machine()} server, no GPU",
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "protocol": protocol,
        "training_seconds": round(sum(run.get("training_seconds", 0) for run in runs), 1),
        "runs": runs,
    }


def read(path: pathlib.Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """A run that was kept, refused under another protocol."""
    kept = json.loads(path.read_text())
    if kept["protocol"] != protocol:
        raise ValueError(
            f"{path} was made under {kept['protocol']}, not {protocol}. Take another --workdir."
        )
    return kept["run"]


def main() -> None:
    args = parse()
    torch.set_num_threads(1)  # networks this small are slower on two
    args.workdir.mkdir(parents=True, exist_ok=True)
    protocol = {k: v for k, v in vars(args).items() if k not in ("workdir", "seeds", "output")}
    runs = []
    for seed in args.seeds:
        for pair in PAIRS:
            for method in METHODS:
                if method == "FM" and PAIRS[pair][0] is not gaussian:
                    continue  # its path starts at a standard normal
                path = args.workdir / f"{pair}_{method}_{seed}.json"
                if not path.exists():
                    write(path, {"protocol": protocol, "run": run(pair, method, seed, args)})
                found = read(path, protocol)
                runs.append(found)
                if method == "SF2M":
                    kept = ("pair", "seed", "wasserstein2", "path_energy", "date")
                    runs.append({"method": "SB-CFM"} | {k: found[k] for k in kept})
                print(json.dumps(found), flush=True)
    write(args.output, record("toy_table_torchcfm", PACKAGES, protocol, runs))


if __name__ == "__main__":
    main()
