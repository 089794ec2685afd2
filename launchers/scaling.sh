#!/usr/bin/env bash
# Measures how the 1B model scales over the GPUs of this host, in at most eight minutes, and writes one table and one plot.
#
#   launchers/scaling.sh                                             # 1, 2, 4 and 8 GPUs, as many as there are
#   launchers/scaling.sh --table docs/results/scaling.md --dry-run
#
#   --python PATH    the interpreter                                 (PYTHON, or python3)
#   --parts "NAMES"  of speed, save and restart                      (all)
#   --gpus N         1, 2, 4 or 8                                    (as many as there are)
#   --table FILE     the page; its JSON and its plot go beside it    (outputs/scaling/scaling.md)
#   --out DIR        for logs                                        (outputs/scaling)
#   --scratch DIR    for checkpoints, about 20 GiB                   (the system's temporary folder)
#   --patience X     factor on the time limits of the parts          (1)
#   --size toy       a tiny model on CPUs, to see the output
#   --dry-run        print what would be measured, start nothing
#
# Layouts: data parallel over 1, 2, 4 and 8 GPUs; over all of them also tp 2, pp 2, pp 2 with vpp 2, tp 2 x pp 2, cp 2, cp 4 and ZeRO 2, each with the
# rest data parallel. Each beside full attention and a counterpart share of 1/4. Exit codes: 0 everything was measured and every requirement reached,
# 1 not so, 3 wrong options.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
root=${here%/*}
export PYTHONPATH=$root:$root/kernels:$root/tests${PYTHONPATH:+:$PYTHONPATH}
# shellcheck source=launchers/interpreter.bash
source "$here/interpreter.bash"
find_interpreter "${BASH_SOURCE[0]}" "$@"

arguments=()
while (($#)); do
    case $1 in
        --python=*) ;;
        --python) shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
exec "$python" -m benchmarks.scaling --suite scaling "${arguments[@]}"
