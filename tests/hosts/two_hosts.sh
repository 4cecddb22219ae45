#!/usr/bin/env bash
# Two hosts, as network namespaces with a cable between them: a rank on each, the cable is cut, both go on afterwards.
# Usage: two_hosts.sh DPO-HOST. Without root or iproute2 it says so and passes.
set -euo pipefail

binary=$(realpath "$1")
golden=$(cd "$(dirname "$0")/../golden/trajectories/qwen2" && pwd)
work=$(mktemp -d)
hosts=("dpo-$$-0" "dpo-$$-1")

end() {
  kill $(jobs -p) 2>/dev/null || true
  for host in "${hosts[@]}"; do ip netns delete "$host" 2>/dev/null || true; done
  rm -rf "$work"
}
trap end EXIT

if ! ip netns add "${hosts[0]}" 2>/dev/null; then
  echo "skipped: ip netns cannot be used here (it needs root and iproute2)"
  exit 0
fi
ip netns add "${hosts[1]}"
ip -n "${hosts[0]}" link add cable type veth peer name cable netns "${hosts[1]}"
for side in 0 1; do
  ip -n "${hosts[$side]}" address add "10.77.0.$((side + 1))/24" dev cable
  ip -n "${hosts[$side]}" link set cable up
  ip -n "${hosts[$side]}" link set lo up
done

# rank NUMBER OUTPUT PORT: starts a rank on its host; rank 0 is at 10.77.0.1.
rank() {
  RANK=$1 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=$3 DPO_HOST_SECRET=$work RAYON_NUM_THREADS=1 \
    XDG_CACHE_HOME="$work/cache" exec ip netns exec "${hosts[$1]}" "$binary" train --device cpu --model "$golden/model" \
    --dataset "$golden/prefs.jsonl" --output-dir "$work/$2" --batch-size 4 --max-steps 600 --save-steps 20 \
    --logging-steps 1 --seed 7 --learning-rate 2e-3 --resume-from-checkpoint latest >/dev/null 2>"$work/$2-$1.err"
}

fail() {
  echo "$1" >&2
  tail -n 3 "$work"/*.err >&2
  exit 1
}

# both OUTPUT PORT: runs both ranks to their end.
both() {
  rank 0 "$1" "$2" & local first=$!
  rank 1 "$1" "$2" & local second=$!
  wait $first && wait $second || fail "the run $1 failed"
}

both whole 4001

rank 0 cut 4002 & first=$!
rank 1 cut 4002 & second=$!
for _ in $(seq 600); do
  [ -d "$work/cut/checkpoint-20" ] && break
  sleep 0.05
done
[ -d "$work/cut/checkpoint-20" ] || fail "no checkpoint came"
ip -n "${hosts[0]}" link set cable down
start=$(date +%s%N)
wait $first && fail "rank 0 went on without rank 1"
wait $second && fail "rank 1 went on without rank 0"
took=$((($(date +%s%N) - start) / 1000000))
grep -q "^error: .*rank 1 (.*) has been silent" "$work/cut-0.err" || fail "rank 0 does not name rank 1"
grep -q "^error: .*rank 0 (.*) has been silent" "$work/cut-1.err" || fail "rank 1 does not name rank 0"
[ $took -lt 10000 ] || fail "it took $took ms"
[ -e "$work/cut/adapter_model.safetensors" ] && fail "the run was over before the link was cut"

ip -n "${hosts[0]}" link set cable up
both cut 4003
cmp "$work/whole/adapter_model.safetensors" "$work/cut/adapter_model.safetensors" || fail "the adapters differ"
echo "two hosts: both ended $took ms after the cut and named each other; resumed, the adapter is that of the whole run"
