#!/usr/bin/env bash
# Submit dense-6.7b to a SLURM cluster: 16 nodes of 8 GPUs, in the layout planned for a100-80gb.
#
#   bash launch_scripts/paper/dense-6.7b.sh data.train='[{path: /data/text}]' run.dir=/runs/dense-6.7b \
#       --account me --time 24:00:00 --dry-run
#
# What follows the name is what `megamoe submit` takes, and wins over what stands here; options that are the same for
# all jobs of a site fit into a file (--cluster-settings, or MEGAMOE_CLUSTER_SETTINGS).
# Written by tools/write_launch_scripts.py.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
find_environment
exec "$python" -m megamoe submit "$root/launch_scripts/layouts/dense-6.7b.yaml" --nodes 16 --gpus-per-node 8 \
    --cluster a100-80gb run.dir=runs/dense-6.7b "$@"
