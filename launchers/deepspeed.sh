#!/usr/bin/env bash
# Training with DeepSpeed's own launcher, on one node or on those of a hostfile; engine=deepspeed is added.
#
#   launchers/deepspeed.sh --num-gpus 8 experiment=ssa_1b_8k data.path=DIR
#   launchers/deepspeed.sh --hostfile hosts experiment=ssa_1b_8k data.path=DIR parallel=tp2_sp deepspeed.zero_stage=2
#
#   --num-gpus N        processes on each node, one a GPU (or on the CPU)    (NUM_GPUS, or every GPU)
#   --num-nodes N       nodes of the hostfile that are used                  (NUM_NODES, or all of them)
#   --hostfile PATH     lines "HOST slots=GPUS"; the nodes are reached by ssh, pdsh if it is there    (HOSTFILE; none: this node)
#   --include SPEC, --exclude SPEC    nodes and GPUs, as DeepSpeed writes them: node1:0,2@node2
#   --master-port PORT  where the processes meet                             (MASTER_PORT, or 29500)
#   --python PATH       the interpreter                                      (PYTHON, or python3)
#   --module NAME       the entry point                                      (ssa_pretrain.train)
#   --dry-run           print the exact command, the run's plan and DeepSpeed's configuration; start nothing
#
# A flag counts before the variable in brackets. What follows the flags goes to the entry point as it is. Resuming is the same command again.
# DeepSpeed's launcher returns 0 when its worker on a node is killed; on one node this script then returns 1.
set -euo pipefail

num_gpus=${NUM_GPUS:-}
num_nodes=${NUM_NODES:-}
hostfile=${HOSTFILE:-}
port=${MASTER_PORT:-29500}
python=${PYTHON:-python3}
module=ssa_pretrain.train
chosen=()
dry_run=0

stop() {
    printf 'deepspeed.sh: %s\n' "$*" >&2
    exit 3
}

while (($#)); do
    case $1 in
        --num-gpus | --num-nodes | --hostfile | --include | --exclude | --master-port | --python | --module)
            (($# > 1)) || stop "$1 needs a value; see --help"
            case $1 in
                --num-gpus) num_gpus=$2 ;;
                --num-nodes) num_nodes=$2 ;;
                --hostfile) hostfile=$2 ;;
                --include | --exclude) chosen+=("$1=$2") ;;
                --master-port) port=$2 ;;
                --python) python=$2 ;;
                --module) module=$2 ;;
            esac
            shift 2
            ;;
        --dry-run) dry_run=1 && shift ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        --*) stop "$1 is no flag of this; put flags of the entry point after --" ;;
        *) break ;;
    esac
done

[[ -z $num_gpus || $num_gpus =~ ^[1-9][0-9]*$ ]] || stop "--num-gpus=$num_gpus must be a positive number; try 8"
[[ -z $num_nodes || $num_nodes =~ ^[1-9][0-9]*$ ]] || stop "--num-nodes=$num_nodes must be a positive number; try 2"
[[ $port =~ ^[1-9][0-9]{0,4}$ ]] || stop "--master-port=$port must be a port; try 29500"
[[ -z $hostfile || -f $hostfile ]] || stop "--hostfile=$hostfile is not there; it has a line such as 'node0 slots=8' for each node"
[[ -n $hostfile || ${num_nodes:-1} == 1 ]] || stop "--num-nodes=$num_nodes needs --hostfile, with a line such as 'node0 slots=8' for each node"
((${#chosen[@]} == 0)) || [[ -z $num_gpus$num_nodes ]] || stop "--include and --exclude name the GPUs; leave out --num-gpus and --num-nodes"

export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A hostfile that is not there means this node; DeepSpeed would look for /job/hostfile otherwise.
command=("$python" -m deepspeed.launcher.runner "--hostfile=${hostfile:-/nonexistent}" ${num_nodes:+"--num_nodes=$num_nodes"})
command+=(${num_gpus:+"--num_gpus=$num_gpus"} ${chosen[@]+"${chosen[@]}"} "--master_port=$port" --module "$module" engine=deepspeed "$@")

world=
[[ -z $hostfile && -n $num_gpus ]] && world=$num_gpus
[[ -n $hostfile && -n $num_gpus && -n $num_nodes ]] && world=$((num_gpus * num_nodes))
if ((dry_run)); then
    printf 'PYTHONSAFEPATH=1 OMP_NUM_THREADS=%s ' "$OMP_NUM_THREADS"
    printf '%q ' "${command[@]}"
    printf '\n'
    # The plan's own command is torchrun's; DeepSpeed's stands above.
    "$python" -m "$module" engine=deepspeed "$@" ${world:+"parallel.world_size=$world"} dry_run=true | sed '/^command  /d'
    exit
fi
# A bad setting is said once and before any process starts.
if [[ -n $world && $module == ssa_pretrain.train ]]; then
    WORLD_SIZE=$world "$python" -m ssa_pretrain.plan --check engine=deepspeed "$@"
fi
[[ -z $hostfile && $module == ssa_pretrain.train ]] || exec "${command[@]}"

# One node: the run's first process leaves a mark when it ends well, for the launcher's own code does not tell.
mark=$(mktemp)
trap 'rm -f "$mark"' EXIT
export SSA_PRETRAIN_END_MARK=$mark
"${command[@]}" &
launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null' TERM INT
code=0
wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do  # a signal ends a wait
    wait "$launcher" || code=$?
done
if ((code == 0)) && [[ ! -s $mark ]]; then
    printf "deepspeed.sh: DeepSpeed's launcher returned 0, but the run did not come to its end: a process was killed; say the same again to resume\n" >&2
    code=1
fi
exit "$code"
