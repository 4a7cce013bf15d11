#!/usr/bin/env bash
# CIFAR-10 on two machines of several GPUs, started by ssh from a third or from one of them.
#
#   experiments/pods/two_machines.sh HOST0 HOST1 FOLDER
#
# Both have the repository in ~/fmjax and see the folder (a mount, or gs://BUCKET/...); HOST1 reaches
# port 12345 of HOST0. Ctrl-C here tells HOST0, and both save and end after the same step.
set -euo pipefail
hosts=("$1" "$2") folder=$(printf %q "$3")

start() {  # the number of a process
  ssh "${hosts[$1]}" "cd fmjax && echo \$\$ > cifar10-$1.pid && exec python -m experiments.cifar10 \
    --workdir $folder --precision bfloat16 --steps-per-dispatch 10 --cluster.heartbeat-seconds 30 \
    --cluster.coordinator ${hosts[0]#*@}:12345 --cluster.num-processes 2 --cluster.process-id $1"
}

trap 'ssh "${hosts[0]}" "kill -TERM \$(cat fmjax/cifar10-0.pid)"' INT
start 0 & processes=("$!")
start 1 & processes+=("$!")
code=0
for process in "${processes[@]}"; do
  while :; do
    ended=0
    wait "$process" || ended=$?
    kill -0 "$process" 2>/dev/null || break  # Ctrl-C interrupts wait
  done
  [ "$ended" = 0 ] || code=$ended
done
exit "$code"
