"""torchcfm's CIFAR-10 U-Net under torch.compile in bfloat16, for `accelerator`: JSON on stdout.

    python -m experiments.benchmarks.accelerator_torchcfm 128 3     # batch size, repetitions

Needs a GPU and the extra `benchmarks`; without them it says so and exits with 1. The training step
is that of torchcfm's script: conditional flow matching, gradient clipped at 1, Adam, moving
average; in channels-last layout, with parameters in float32 and autocast.
"""

import copy
import json
import statistics
import sys
import time


def main(batch_size: int, repetitions: int) -> None:
    try:
        import torch
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        from experiments.benchmarks.compare.torch_unet import network
    except ImportError as error:
        sys.exit(f"torchcfm is not timed: {error}")
    if not torch.cuda.is_available():
        sys.exit("torchcfm is not timed: torch sees no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    net = network().to("cuda", memory_format=torch.channels_last)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, fused=True)
    compiled, matcher = torch.compile(net), ConditionalFlowMatcher(sigma=0.0)
    x1 = torch.rand(batch_size, 3, 32, 32, device="cuda") * 2 - 1
    x1 = x1.contiguous(memory_format=torch.channels_last)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        t, x_t, u_t = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        with torch.autocast("cuda", torch.bfloat16):
            u = compiled(t, x_t)
        loss = torch.mean((u.float() - u_t) ** 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1e-4)

    @torch.no_grad()
    def sample() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            compiled(torch.zeros(batch_size, device="cuda"), x1)

    rows = []
    for work, run in (("training", train), ("sampling", sample)):
        net.train(work == "training")
        for _ in range(5):  # compiles
            run()
        times = []
        for _ in range(repetitions):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(10):
                run()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began) / 10)
        rate = batch_size / statistics.median(times)
        name = "torchcfm, torch.compile"
        rows.append(
            {"network": name, "work": work, "batch_size": batch_size, "images_per_second": rate}
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
