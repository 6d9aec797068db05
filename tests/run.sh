#!/usr/bin/env bash
# Install what the tests need, check the style, run the tests. Arguments go to pytest:
#
#   bash tests/run.sh                 everything
#   bash tests/run.sh -k gate         what has "gate" in its name
#   bash tests/run.sh -m "not slow"   without the tests of whole commands
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch_scripts/environment.sh"
cd "$root"
use_environment "[dev]"

status=0
"$python" -m ruff check . || status=1
"$python" -m pytest --durations=15 "$@" || status=$?
exit "$status"
