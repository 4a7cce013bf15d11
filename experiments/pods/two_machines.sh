#!/usr/bin/env bash
# CIFAR-10 on two machines of several GPUs, started by ssh from a third or from one of them.
#
#   experiments/pods/two_machines.sh HOST0 HOST1 FOLDER
#
# Both have the repository in ~/fmjax and see the folder (a mount, or gs://BUCKET/...); HOST1 reaches
# port 12345 of HOST0. Ctrl-C here tells HOST0, and both save and end after the same step.
set -euo pipefail
hosts=("$1" "$2") folder=$3

start() {  # the number of a process
  ssh "${hosts[$1]}" "cd fmjax && echo \$\$ > cifar10.pid && exec python -m experiments.cifar10 \
    --workdir $folder --precision bfloat16 --steps-per-dispatch 10 --cluster.heartbeat-seconds 30 \
    --cluster.coordinator ${hosts[0]}:12345 --cluster.num-processes 2 --cluster.process-id $1"
}

trap 'ssh "${hosts[0]}" "kill -TERM \$(cat fmjax/cifar10.pid)"' INT
start 0 & first=$!
start 1 & second=$!
code=0
wait "$first" "$second" || code=$?
while kill -0 "$first" 2>/dev/null || kill -0 "$second" 2>/dev/null; do  # Ctrl-C interrupts wait
  wait "$first" "$second" || code=$?
done
exit "$code"
