#!/usr/bin/env bash
# The whole pipeline on any CPU: real text -> indexed binaries -> a small SSA Llama on two processes -> held-out evaluation -> report.html.
# `make quickstart` builds the environment first and then calls this.
#
#   launchers/quickstart.sh [--venv DIR] [--out DIR] [--dry-run] [KEY=VALUE ...]
#
#   --venv DIR   the virtual environment (.venv)
#   --out DIR    the folder for everything (outputs/quickstart)
#   --dry-run    check the settings and print the four commands; start nothing
#   KEY=VALUE    settings of the run, such as training.steps=50
#
# Each program skips what is already done: run the same command again after an interruption and it continues.
# SIGTERM, Ctrl-C and SIGHUP stop it with exit code 7, training with a checkpoint; a second Ctrl-C ends it at once.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=launchers/interpreter.bash
source "$here/interpreter.bash"

venv=.venv previous=
for word in "$@"; do
    [[ $word != -h && $word != --help ]] || { usage "${BASH_SOURCE[0]}" && exit 0; }
    [[ $word != --venv=* ]] || venv=${word#*=}
    [[ $previous != --venv ]] || venv=$word
    previous=$word
done
python=$venv/bin/python
if ! has_package "$python"; then  # any Python can report that, and print the commands
    python=python3
    export PYTHONPATH=${here%/*}${PYTHONPATH:+:$PYTHONPATH}
fi
exec "$python" -m ssa_pretrain.launch quickstart "$@"
