#!/usr/bin/env bash
# Training with torchrun, on one node or on several that meet through a c10d rendezvous.
#
#   launchers/torchrun.sh --nproc-per-node 8 experiment=ssa_1b_8k parallel=dp
#   launchers/torchrun.sh --nnodes 4 --nproc-per-node 8 --rdzv-endpoint node0:29400 experiment=ssa_1b_8k    # on each node
#
#   --nproc-per-node N       processes on this node, one a GPU           (NPROC_PER_NODE, or auto: every GPU)
#   --nnodes N               nodes                                       (NNODES, or 1)
#   --rdzv-endpoint HOST:PORT  one of the nodes; all must reach it       (RDZV_ENDPOINT; needed for more than one node)
#   --rdzv-id NAME           tells jobs on one endpoint apart            (RDZV_ID, or ssa_pretrain)
#   --python PATH            the interpreter                             (PYTHON, or python3)
#   --module NAME            the entry point                             (ssa_pretrain.train)
#   --dry-run                print the exact command and the run's plan; start nothing
#
# --nproc_per_node=8 is as good. A flag counts before the variable in brackets. What follows the flags goes to the entry point as it is.
# Resuming is the same command again.
# After SIGTERM torchrun waits TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (600) for the processes to save before it kills them (torch 2.11: always 30).
set -euo pipefail

nproc=${NPROC_PER_NODE:-auto}
nnodes=${NNODES:-1}
endpoint=${RDZV_ENDPOINT:-}
id=${RDZV_ID:-ssa_pretrain}
python=${PYTHON:-python3}
module=ssa_pretrain.train
dry_run=0

stop() {
    printf 'torchrun.sh: %s\n' "$*" >&2
    exit 3
}

while (($#)); do
    flag=${1%%=*} value=${2-} words=2
    [[ $1 != --* ]] || flag=${flag//_/-}
    [[ $1 != --*=* ]] || { value=${1#*=} && words=1; }
    case $flag in
        --nproc-per-node | --nnodes | --rdzv-endpoint | --rdzv-id | --python | --module)
            [[ -n $value ]] || stop "$flag needs a value; see --help"
            case $flag in
                --nproc-per-node) nproc=$value ;;
                --nnodes) nnodes=$value ;;
                --rdzv-endpoint) endpoint=$value ;;
                --rdzv-id) id=$value ;;
                --python) python=$value ;;
                --module) module=$value ;;
            esac
            shift "$words"
            ;;
        --dry-run)
            [[ $1 != *=* ]] || stop "--dry-run takes no value; leave out =${1#*=}"
            dry_run=1 && shift
            ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        --*) stop "$1 is no flag of this; put flags of the entry point after --" ;;
        *) break ;;
    esac
done

[[ $nnodes =~ ^[1-9][0-9]*$ ]] || stop "--nnodes=$nnodes must be a positive number; try 1"
[[ $nproc =~ ^([1-9][0-9]*|auto|gpu)$ ]] || stop "--nproc-per-node=$nproc must be a positive number, gpu or auto; try 8"
if ((nnodes > 1)); then
    [[ -n $endpoint ]] || stop "--nnodes=$nnodes needs --rdzv-endpoint=HOST:PORT, the same on every node; try the first node's name and port 29400"
    meet=(--rdzv-backend=c10d "--rdzv-endpoint=$endpoint" "--rdzv-id=$id")
else
    meet=(--standalone)
fi

export PYTHONSAFEPATH=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Said here, since the interpreter's own words would be a trace and the shell's a bare 127.
remedy="try --python=.venv/bin/python, which make quickstart makes"
command -v -- "$python" >/dev/null || stop "--python=$python is not there or cannot be run; $remedy"
finding='import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)'
"$python" -c "$finding" "${module%%.*}" 2>/dev/null || stop "--python=$python has no package ${module%%.*}; $remedy, or pip install -e . into that one"

command=("$python" -m torch.distributed.run "--nnodes=$nnodes" "--nproc-per-node=$nproc" "${meet[@]}" -m "$module" "$@")

# What auto and gpu come to here, by torchrun's own count; empty where the interpreter cannot say.
count=$nproc
if [[ ! $nproc =~ ^[0-9]+$ ]]; then
    counting='import sys; from torch.distributed.run import determine_local_world_size as count; print(count(sys.argv[1]))'
    count=$("$python" -c "$counting" "$nproc" 2>/dev/null) || count=
    [[ $count =~ ^[1-9][0-9]*$ ]] || count=
fi

if ((dry_run)); then
    printf 'PYTHONSAFEPATH=1 OMP_NUM_THREADS=%s TORCH_ELASTIC_SHUTDOWN_TIMEOUT=%s ' "$OMP_NUM_THREADS" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    printf '%q ' "${command[@]}"
    printf '\n'
    world=()
    if [[ -n $count ]]; then
        world=("parallel.world_size=$((nnodes * count))")
    elif [[ " $*" != *" parallel.world_size="* ]]; then
        printf 'torchrun.sh: the plan is for 1 process, since the GPUs of a node cannot be counted here; --nproc-per-node=N gives their number\n' >&2
    fi
    # The plan's own guess at a command is left out: the exact one stands above.
    "$python" -m "$module" "$@" ${world[@]+"${world[@]}"} dry_run=true | sed '/^command  /d'
    exit
fi
# A bad setting is said once and before any process starts: torchrun would add a trace of its own.
if [[ -n $count && $module == ssa_pretrain.train ]]; then
    WORLD_SIZE=$((nnodes * count)) "$python" -m ssa_pretrain.plan --check "$@"
fi
exec "${command[@]}"
