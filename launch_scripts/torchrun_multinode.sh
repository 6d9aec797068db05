#!/usr/bin/env bash
# Train over several machines by torchrun. Run it on every one of them, with the same arguments:
#
#   NUM_NODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash launch_scripts/torchrun_multinode.sh CONFIG [section.key=value ...]
#   NUM_NODES=2 NODE_RANK=1 MASTER_ADDR=node-a bash launch_scripts/torchrun_multinode.sh CONFIG [section.key=value ...]
#
# MASTER_ADDR      name or address of node 0, as the others reach it
# MASTER_PORT      a free port there (29500)
# RANKS_PER_NODE   ranks on each machine (the number of its GPUs, 1 without any)
#
# Ranks follow NODE_RANK. torchrun's elastic rendezvous (--rdzv-backend c10d) would number machines as they come, and
# the tensor and expert groups would stretch over machines.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[[ $# -ge 1 ]] || fail "usage: NUM_NODES=n NODE_RANK=i MASTER_ADDR=host bash launch_scripts/torchrun_multinode.sh CONFIG ..."
for name in NUM_NODES NODE_RANK MASTER_ADDR; do
    [[ -n ${!name:-} ]] || fail "$name is not set; the first lines of ${BASH_SOURCE[0]} say what it is."
done
((NODE_RANK < NUM_NODES)) || fail "NODE_RANK=$NODE_RANK must be below NUM_NODES=$NUM_NODES: nodes count from 0."

num_gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU ' || true)
ranks_per_node=${RANKS_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}
find_environment
exec "$python" -m torch.distributed.run \
    --nnodes "$NUM_NODES" --node-rank "$NODE_RANK" --nproc-per-node "$ranks_per_node" \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    -m megamoe train "$@"
