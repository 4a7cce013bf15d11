"""Whether a process is one of several: what JAX detects, and what the environment says.

JAX detects Cloud TPU slices, Slurm's srun, Open MPI up to 4 and, with `jax[k8s]`, indexed jobs of
Kubernetes. Where it detects none although the environment names several processes, each of them
would train a run of its own; `find` refuses that.
"""

import os
import socket
import sys
import warnings
from typing import NamedTuple

from jax._src import clusters  # JAX's own detection: its public functions only act on it


class Pod(NamedTuple):
    """What JAX detects.

    Attributes:
      num_processes: processes in all.
      process_id: number of this one, counted from 0.
    """

    num_processes: int
    process_id: int


def find() -> Pod | None:
    """The pod of several processes that this one belongs to, by JAX's own detection.

    Returns:
      None for a process that is alone: one in which nothing is detected, or a pod of one.

    Raises:
      ValueError: if JAX detects none, or fails at it, and the environment names several processes.
    """
    pod, reason = None, "JAX detects no pod"
    try:
        pod = _detected()
    except Exception as error:  # of the metadata server's or Kubernetes's client
        first = (str(error) or type(error).__name__).splitlines()[0]
        reason = f"JAX can't ask what pod it is: {first}"
        if told() is None:
            print(f"{reason}. This process trains alone.", file=sys.stderr)
    if pod is not None:
        return pod if pod.num_processes > 1 else None
    if named := told():
        hint = _HINTS.get(named.partition("=")[0], "")
        raise ValueError(
            f"The processes of a pod must join it, else each trains a run of its own; got {named} "
            f"on {socket.gethostname()}, where {reason}. {hint}Give {THREE}, or --cluster.join no "
            "for runs of one process."
        )
    return None


def told() -> str | None:
    """What in the environment says that there are several processes, NAME=VALUE, or None."""
    if "JOB_COMPLETION_INDEX" in os.environ:  # the number of its jobs stands nowhere
        return f"JOB_COMPLETION_INDEX={os.environ['JOB_COMPLETION_INDEX']}"
    for name in _COUNTS:
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 1:
            return f"{name}={value}"
    return in_slice()


def in_slice() -> str | None:
    """As `told`, of the hosts of a TPU slice alone, which have to work together."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if "," in os.environ.get(name, ""):
            return f"{name}={os.environ[name]}"
    return None


def told_number() -> int | None:
    """This process's number by the environment, or None where that names one process."""
    named = told()
    value = os.environ.get(_NUMBERS.get((named or "").partition("=")[0], ""), "")
    return int(value) if value.isdigit() else None


def _detected() -> Pod | None:
    for kind in clusters.ClusterEnv._cluster_types:
        if _worth_asking(kind):
            with warnings.catch_warnings():  # of a package that is missing: `find` says it
                warnings.simplefilter("ignore")
                present = kind.is_env_present()
            if present:
                return Pod(kind.get_process_count() or 1, kind.get_process_id())
    return None


def _worth_asking(kind: type[clusters.ClusterEnv]) -> bool:
    """Not where JAX would wait for processes that nobody starts."""
    if kind is clusters.SlurmCluster:  # in the shell of an allocation it counts the tasks to come
        return os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    if kind is clusters.K8sCluster:  # a notebook's container is in Kubernetes as well
        return "JOB_COMPLETION_INDEX" in os.environ
    return not kind.opt_in_only_method


THREE = "--cluster.coordinator HOST:PORT, --cluster.num-processes N and --cluster.process-id I"
_COUNTS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MEGASCALE_NUM_SLICES")
_NUMBERS = {
    "JOB_COMPLETION_INDEX": "JOB_COMPLETION_INDEX",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "TPU_PROCESS_ADDRESSES": "TPU_WORKER_ID",
    "TPU_WORKER_HOSTNAMES": "TPU_WORKER_ID",
}
_HINTS = {
    "JOB_COMPLETION_INDEX": "In Kubernetes it needs pip install 'jax[k8s]' and leave to read pods, "
    "services and jobs. ",
    "OMPI_COMM_WORLD_SIZE": "Of Open MPI 5 it may not know the address; $OMPI_COMM_WORLD_RANK is "
    "the process's number. ",
    "SLURM_STEP_NUM_TASKS": "It needs srun's own variables. ",
    "MEGASCALE_NUM_SLICES": "On TPUs it needs pip install 'jax[tpu]'. ",
    "TPU_PROCESS_ADDRESSES": "On TPUs it needs pip install 'jax[tpu]'. ",
    "TPU_WORKER_HOSTNAMES": "On TPUs it needs pip install 'jax[tpu]'. ",
}
