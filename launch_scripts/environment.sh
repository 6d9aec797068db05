# Sourced by the scripts beside it and by tests/run.sh: finds or makes the Python environment that holds megamoe.
#
#   use_environment [EXTRAS]   the active environment, else .venv of the repository (made if missing);
#                              installs megamoe there if that was not done yet. EXTRAS: "" or "[dev]".
#   find_environment           the same without making or installing anything
#
# Both set $python. PYTHON=/path/to/python3.11 chooses the Python that .venv is made with.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# An environment that is active; conda's base does not count, for nobody wants a training stack in it.
active_environment() {
    if [[ -n ${VIRTUAL_ENV:-} ]]; then
        echo "$VIRTUAL_ENV"
    elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
        echo "$CONDA_PREFIX"
    fi
}

supported_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.10; do
        if is_supported "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    local found
    found=$("${PYTHON:-python3}" --version 2>/dev/null || echo "missing")
    fail "megamoe needs Python 3.10, 3.11 or 3.12; ${PYTHON:-python3} is ${found}." \
        "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv) or name it: PYTHON=/path/to/python3.11"
}

make_environment() {
    local base version
    base=$(supported_python) || exit 2
    if ! "$base" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$base cannot make virtual environments." \
            "Debian, Ubuntu: sudo apt-get install python${version}-venv; then run this again."
    fi
    echo "Making a virtual environment in $environment ..."
    "$base" -m venv --clear "$environment"
}

find_environment() {
    environment=$(active_environment)
    environment=${environment:-$root/.venv}
    python=$environment/bin/python
    if ! "$python" -c 'import megamoe, torch' >/dev/null 2>&1; then
        fail "megamoe is not installed in $environment: pip install -e $root -c $root/constraints.txt," \
            "or run launch_scripts/quickstart.sh once."
    fi
}

use_environment() {
    local extras=${1:-} stamp wanted
    environment=$(active_environment)
    if [[ -z $environment ]]; then
        environment=$root/.venv
        # A half-made one (interrupted) is made anew.
        "$environment/bin/python" -m pip --version >/dev/null 2>&1 || make_environment
    fi
    python=$environment/bin/python
    is_supported "$python" || fail "$environment holds $("$python" --version 2>&1): megamoe needs Python 3.10, 3.11 or 3.12."

    stamp=$environment/.megamoe_installed$extras
    wanted=$(cd "$root" && "$python" -c '
import hashlib, os
files = [open(name, "rb").read() for name in ("setup.py", "constraints.txt")]
print(hashlib.sha256(b"\0".join([os.getcwd().encode(), *files])).hexdigest())')
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    echo "Installing megamoe and what it needs (torch, DeepSpeed, Megatron-core, ...) into $environment."
    echo "The first time this downloads some hundred MB and takes some minutes ..."
    # DeepSpeed comes as source: without `wheel` an older pip warns of the way in which it builds it.
    export PIP_DISABLE_PIP_VERSION_CHECK=1  # the newcomer has no use for news of pip
    "$python" -m pip install -q wheel -c "$root/constraints.txt" &&
        "$python" -m pip install -q -e "$root$extras" -c "$root/constraints.txt" ||
        fail "the installation failed; pip's message is above. Nothing else was changed; run this again once it is mended."
    echo "$wanted" >"$stamp"
}
