#!/usr/bin/env bash
# CIFAR-10 on a Cloud TPU slice; the same command runs on every host, and JAX finds the others.
#
#   experiments/pods/tpu_slice.sh NAME ZONE BUCKET REPOSITORY
#
# The slice is there (gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5litepod-16
# --version v2-alpha-tpuv5-lite, or a queued resource), its service account may write to the bucket,
# and its hosts may clone REPOSITORY, this one's address. A host's own disk is seen by that host
# alone: the run folder has to be on the bucket. Where the slice was preempted, make it again and
# run this again: the run resumes.
set -euo pipefail
name=$1 zone=$2 bucket=$3 repository=$4

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

# The image's own Python may be older than 3.11: uv brings one.
on_every_host "(cd fmjax 2>/dev/null || git clone -q '$repository' fmjax) && pip install -q uv && \
  python3 -m uv venv -q --allow-existing --python 3.11 fmjax/.venv && \
  python3 -m uv pip install -q --python fmjax/.venv 'jax[tpu]' -e 'fmjax[train,gcs]'"

# A host that vanishes ends the others within a minute; the exit code is then 134.
on_every_host "cd fmjax && exec .venv/bin/python -m experiments.cifar10 \
  --workdir gs://$bucket/cifar10 --batch-size 256 --precision bfloat16 --steps-per-dispatch 10 \
  --cluster.heartbeat-seconds 60"
