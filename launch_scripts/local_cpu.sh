#!/usr/bin/env bash
# Train on N ranks of this machine, started by megamoe itself.
#
#   bash launch_scripts/local_cpu.sh NUM_RANKS CONFIG|PRESET [section.key=value ...]
#
# Each rank computes with one thread; OMP_NUM_THREADS=2 and so on gives each more.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
[[ $# -ge 2 ]] || fail "usage: bash launch_scripts/local_cpu.sh NUM_RANKS CONFIG|PRESET [section.key=value ...]"
num_ranks=$1
shift
find_environment
exec "$python" -m megamoe train "$@" --local-ranks "$num_ranks"
