#!/usr/bin/env bash
# The main job on any CPU: real text -> indexed binaries -> a small SSA Llama on two processes -> held-out evaluation -> report.html.
# `make quickstart` makes the environment first and then calls this.
#
#   launchers/quickstart.sh [--venv DIR] [--out DIR] [--dry-run] [KEY=VALUE ...]
#
#   --venv DIR   the virtual environment to use (.venv)
#   --out DIR    everything goes here (outputs/quickstart)
#   --dry-run    check the settings, print the four commands and start nothing
#   KEY=VALUE    settings of the run, such as training.steps=50
#
# Each program finds out by itself what is done already: run the same command again after an interruption and it goes on.
# SIGTERM, Ctrl-C and SIGHUP stop it with exit code 7, training with a checkpoint; a second Ctrl-C ends it at once.
set -euo pipefail

# shellcheck source=launchers/interpreter.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/interpreter.bash"

venv=.venv
out=outputs/quickstart
dry_run=0
settings=()

stop() {
    printf 'quickstart: %s\n' "$*" >&2
    exit 3
}

while (($#)); do
    flag=${1%%=*} value=${2-} words=2
    [[ $1 != --* ]] || flag=${flag//_/-}
    [[ $1 != --*=* ]] || { value=${1#*=} && words=1; }
    case $flag in
        --venv | --out)
            [[ -n $value ]] || stop "$flag needs a value; see --help"
            if [[ $flag == --venv ]]; then venv=$value; else out=$value; fi
            shift "$words"
            ;;
        --dry-run)
            [[ $1 != *=* ]] || stop "--dry-run takes no value; leave out =${1#*=}"
            dry_run=1 && shift
            ;;
        -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
        -*) stop "$1 is not a flag; see --help" ;;
        output_dir | +output_dir | ++output_dir) stop "use --out instead of $1, which all four programs follow; try --out=${1#*=}" ;;
        data.path | +data.path | ++data.path)
            stop "use --out instead of $1: its folder data/ has the text; try --out=DIR, or launchers/torchrun.sh for other data"
            ;;
        *) settings+=("$1") && shift ;;
    esac
done

export CUDA_VISIBLE_DEVICES=""  # the same job on every machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python=$venv/bin/python
run=(experiment=quickstart "output_dir=$out" "data.path=$out/data" ${settings[@]+"${settings[@]}"})

# Reported here, since the interpreter's own words would be a trace and the shell's a bare 127.
missing=
finding='import importlib.util, sys; sys.exit(importlib.util.find_spec("ssa_pretrain") is None)'
if ! command -v -- "$python" >/dev/null; then
    missing="--venv=$venv has no bin/python; run make quickstart, which builds .venv, or --venv=DIR of an environment with this project"
elif ! "$python" -c "$finding" 2>/dev/null; then
    missing="--venv=$venv has no package ssa_pretrain; run make quickstart, which builds .venv, or $python -m pip install -e ."
fi
[[ -z $missing ]] || ((dry_run)) || stop "$missing"

# A bad setting is reported once and at once: before the text is prepared.
if [[ -n $missing ]]; then
    printf 'quickstart: the settings are not checked: %s\n' "$missing" >&2
else
    "$python" -m ssa_pretrain.plan parallel=tp2 parallel.world_size=2 model.vocab_size=4096 "${run[@]}" >/dev/null
fi

headings=(
    "[1/4] Text: English and Python into indexed binaries"
    "[2/4] Training: two processes, tensor parallel"
    "[3/4] Evaluation: the held-out text with full and with sparse attention, and samples"
    "[4/4] Report"
)
prepare=("$python" -m data_prep source=quickstart tokenizer=bpe4k "out=$out/data")
train=(parallel=tp2 "${run[@]}")
evaluate=("$python" -m ssa_pretrain.evaluate evaluation.rows=128 "${run[@]}")
report=("$python" -m ssa_pretrain.report "$out")
show() {
    printf '\n%s\n' "$1" >&2
    printf '%q ' "${@:2}" && printf '\n'
}
if ((dry_run)); then
    show "${headings[0]}" "${prepare[@]}"
    show "${headings[1]}" "$python" -m torch.distributed.run --standalone --nproc-per-node=2 -m ssa_pretrain.train "${train[@]}"
    show "${headings[2]}" "${evaluate[@]}"
    show "${headings[3]}" "${report[@]}"
    exit
fi
exec "$python" -m ssa_pretrain.launch steps \
    "${headings[0]}" "${prepare[@]}" --then \
    "${headings[1]}" "$python" -m ssa_pretrain.launch torchrun --nproc-per-node=2 -- "${train[@]}" --then \
    "${headings[2]}" "${evaluate[@]}" --then \
    "${headings[3]}" "${report[@]}"
