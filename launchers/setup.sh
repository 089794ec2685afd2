#!/usr/bin/env bash
# Builds a virtual environment with this project from a bare Python. `make` calls it; by hand:
#
#   launchers/setup.sh VENV EXTRAS        launchers/setup.sh .venv quickstart,dev
#
# PYTHON       the interpreter to build on; by default the first of python3, python3.13, python3.12, python3.11 that is 3.11, 3.12 or 3.13
# TORCH_INDEX  where CPU builds of torch are; asked beside pip's own index if it answers within five seconds. A CPU build that
#              pip finds by itself (a local wheel, a mirror) is as good. With TORCH_INDEX= pip decides by itself: on a
#              public machine it installs the CUDA build.
#
# If something is missing, it exits with 1 after one sentence with the remedy.
set -euo pipefail

case ${1-} in
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
venv=${1:?usage: launchers/setup.sh VENV EXTRAS}
extras=${2:?usage: launchers/setup.sh VENV EXTRAS}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

stop() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)))' 2>/dev/null
}

find_python() {
    local candidate
    if [[ -n ${PYTHON-} ]]; then
        command -v "$PYTHON" >/dev/null || stop "PYTHON=$PYTHON does not exist; give the path of a Python 3.11, 3.12 or 3.13."
        supported "$PYTHON" || stop "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1), and 3.11, 3.12 or 3.13 is needed; give the path of one."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    stop "no Python 3.11, 3.12 or 3.13 was found; install one (Debian 12, Ubuntu 24.04: sudo apt install python3 python3-venv) or run make PYTHON=/path/to/python."
}

python=$(find_python)
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    stop "$python has no venv module; install it (Debian, Ubuntu: sudo apt install python3-venv) or run make PYTHON=/path/to/another/python."
command -v cc >/dev/null || command -v gcc >/dev/null ||
    stop "no C compiler was found; install one (Debian, Ubuntu: sudo apt install build-essential)."

[[ ! -d $venv || -f $venv/pyvenv.cfg || -z $(ls -A "$venv") ]] ||
    stop "VENV=$venv is a folder with other content; choose another."
if [[ ! -x $venv/bin/python ]] || ! supported "$venv/bin/python"; then
    "$python" -m venv --clear "$venv" || stop "$python could not create a virtual environment in $venv; is the disk full or read-only?"
fi

quiet=()
[[ -t 1 ]] || quiet=(--quiet)  # progress bars are for terminals

install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install ${quiet[@]+"${quiet[@]}"} --retries 2 --constraint "$root/constraints.txt" "$@" ||
        stop "pip could not fetch or build a package (its message is above); check the network, or point pip at a mirror with PIP_INDEX_URL, and run make again."
}

answers() {
    "$venv/bin/python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1].rstrip("/") + "/torch/", timeout=5)' "$1" 2>/dev/null
}

printf 'set-up: packages into %s (once; a few minutes)\n' "$venv"
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    if [[ -n $torch_index ]] && answers "$torch_index"; then
        install --extra-index-url "$torch_index" torch
    else
        install torch
    fi
fi
export DS_BUILD_OPS=0  # DeepSpeed compiles nothing at set-up
# In the Dockerfile's steps, which are run nowhere else: first what the project depends on, then the project.
requirements=$(mktemp)
trap 'rm -f "$requirements"' EXIT
"$venv/bin/python" "$root/launchers/requirements.py" "$extras" >"$requirements" || stop "EXTRAS=$extras must name extras of pyproject.toml; try quickstart,dev."
install --requirement "$requirements"
install --no-deps --editable "$root"
