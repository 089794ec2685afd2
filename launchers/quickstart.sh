#!/usr/bin/env bash
# The main job on any CPU: real text -> indexed binaries -> a small SSA Llama on two processes -> held-out figures -> report.html.
# `make quickstart` makes the environment first and then calls this.
#
#   launchers/quickstart.sh [--venv DIR] [--out DIR] [--dry-run] [KEY=VALUE ...]
#
#   --venv DIR   the virtual environment to use (.venv)
#   --out DIR    everything goes here (outputs/quickstart)
#   --dry-run    check the settings, print the four commands and start nothing
#   KEY=VALUE    settings of the run, such as training.steps=50
#
# Each program finds out by itself what is done already: say the same again after an interruption and it goes on.
set -euo pipefail

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
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        -*) stop "$1 is no flag of this; see --help" ;;
        output_dir | +output_dir | ++output_dir) stop "$1 is said with --out, which all four programs follow; try --out=${1#*=}" ;;
        data.path | +data.path | ++data.path)
            stop "$1 is said with --out, whose folder data/ has the text; try --out=DIR, or launchers/torchrun.sh for other data"
            ;;
        *) settings+=("$1") && shift ;;
    esac
done

export PYTHONSAFEPATH=1         # the folder this is called from is no place of packages
export CUDA_VISIBLE_DEVICES=""  # the same job on every machine
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python=$venv/bin/python
run=(experiment=quickstart "output_dir=$out" "data.path=$out/data" ${settings[@]+"${settings[@]}"})

step() {
    printf '\n[%s] %s\n' "$1" "$2" >&2
    shift 2
    if ((dry_run)); then
        printf '%q ' "$@" && printf '\n'
    else
        "$@"
    fi
}

# Said here, since the interpreter's own words would be a trace and the shell's a bare 127.
missing=
finding='import importlib.util, sys; sys.exit(importlib.util.find_spec("ssa_pretrain") is None)'
if ! command -v -- "$python" >/dev/null; then
    missing="--venv=$venv has no bin/python; say make quickstart, which makes .venv, or --venv=DIR of an environment with this project"
elif ! "$python" -c "$finding" 2>/dev/null; then
    missing="--venv=$venv has no package ssa_pretrain; say make quickstart, which makes .venv, or $python -m pip install -e ."
fi
[[ -z $missing ]] || ((dry_run)) || stop "$missing"

# A bad setting is said once and at once: before the text is prepared, and before torchrun would add a trace of its own.
if [[ -n $missing ]]; then
    printf 'quickstart: the settings are not checked: %s\n' "$missing" >&2
else
    "$python" -m ssa_pretrain.plan parallel=tp2 parallel.world_size=2 model.vocab_size=4096 "${run[@]}" >/dev/null
fi
step 1/4 "Text: English and Python into indexed binaries" \
    "$python" -m data_prep source=quickstart tokenizer=bpe4k "out=$out/data"
((dry_run)) || WORLD_SIZE=2 "$python" -m ssa_pretrain.plan --check parallel=tp2 "${run[@]}"
step 2/4 "Training: two processes, tensor parallel" \
    "$python" -m torch.distributed.run --standalone --nproc-per-node=2 -m ssa_pretrain.train parallel=tp2 "${run[@]}"
step 3/4 "Evaluation: the held-out text with full and with sparse attention, and samples" \
    "$python" -m ssa_pretrain.evaluate evaluation.rows=128 "${run[@]}"
step 4/4 "Report" \
    "$python" -m ssa_pretrain.report "$out"
