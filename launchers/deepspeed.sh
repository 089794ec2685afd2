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
# --num_gpus=8 is as good. A flag counts before the variable in brackets. What follows the flags goes to the entry point as it is.
# Resuming is the same command again.
# DeepSpeed's launcher returns 0 when its worker on a node is killed; on one node this script then returns 1.
set -euo pipefail

num_gpus=${NUM_GPUS:-}
num_nodes=${NUM_NODES:-}
hostfile=${HOSTFILE:-}
port=${MASTER_PORT:-29500}
python=${PYTHON:-python3}
module=ssa_pretrain.train
include=
exclude=
dry_run=0

stop() {
    printf 'deepspeed.sh: %s\n' "$*" >&2
    exit 3
}

while (($#)); do
    flag=${1%%=*} value=${2-} words=2
    [[ $1 != --* ]] || flag=${flag//_/-}
    [[ $1 != --*=* ]] || { value=${1#*=} && words=1; }
    case $flag in
        --num-gpus | --num-nodes | --hostfile | --include | --exclude | --master-port | --python | --module)
            [[ -n $value ]] || stop "$flag needs a value; see --help"
            case $flag in
                --num-gpus) num_gpus=$value ;;
                --num-nodes) num_nodes=$value ;;
                --hostfile) hostfile=$value ;;
                --include) include=$value ;;
                --exclude) exclude=$value ;;
                --master-port) port=$value ;;
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

[[ -z $num_gpus || $num_gpus =~ ^[1-9][0-9]*$ ]] || stop "--num-gpus=$num_gpus must be a positive number; try 8"
[[ -z $num_nodes || $num_nodes =~ ^[1-9][0-9]*$ ]] || stop "--num-nodes=$num_nodes must be a positive number; try 2"
[[ $port =~ ^[1-9][0-9]{0,4}$ && $port -le 65535 ]] || stop "--master-port=$port must be a port, 1 to 65535; try 29500"
[[ -z $hostfile || -f $hostfile ]] || stop "--hostfile=$hostfile is not there; it has a line such as 'node0 slots=8' for each node"
[[ -n $hostfile || ${num_nodes:-1} == 1 ]] || stop "--num-nodes=$num_nodes needs --hostfile, with a line such as 'node0 slots=8' for each node"
[[ -z $include$exclude || -z $num_gpus$num_nodes ]] || stop "--include and --exclude name the GPUs; leave out --num-gpus and --num-nodes"
[[ -z $include || -z $exclude ]] || stop "--include and --exclude cannot both be given; name with --include what is left"

# The hosts and how many GPUs each has.
hosts=()
slots=()
if [[ -n $hostfile ]]; then
    while read -r host rest || [[ -n $host ]]; do
        [[ -n ${host%$'\r'} && $host != \#* ]] || continue
        [[ $rest =~ ^slots=([1-9][0-9]*)([[:space:]]|$) ]] ||
            stop "--hostfile=$hostfile has a line '$host${rest:+ $rest}', which must be HOST slots=GPUS; try '$host slots=8'"
        [[ " ${hosts[*]-} " != *" $host "* ]] || stop "--hostfile=$hostfile has $host twice; leave one line of it, with all its slots"
        hosts+=("$host")
        slots+=("${BASH_REMATCH[1]}")
    done <"$hostfile"
    ((${#hosts[@]})) || stop "--hostfile=$hostfile names no host; write a line such as 'node0 slots=8' for each node"
    ((${num_nodes:-1} <= ${#hosts[@]})) || stop "--num-nodes=$num_nodes is more than the hosts of --hostfile=$hostfile; try ${#hosts[@]}"
fi

export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Said here, since the interpreter's own words would be a trace and the shell's a bare 127.
remedy="try --python=.venv/bin/python, which make quickstart makes"
command -v -- "$python" >/dev/null || stop "--python=$python is not there or cannot be run; $remedy"
finding='import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)'
"$python" -c "$finding" "${module%%.*}" 2>/dev/null || stop "--python=$python has no package ${module%%.*}; $remedy, or pip install -e . into that one"

# A hostfile that is not there means this node; DeepSpeed would look for /job/hostfile otherwise.
command=("$python" -m deepspeed.launcher.runner "--hostfile=${hostfile:-/nonexistent}" ${num_nodes:+"--num_nodes=$num_nodes"})
command+=(${num_gpus:+"--num_gpus=$num_gpus"} ${include:+"--include=$include"} ${exclude:+"--exclude=$exclude"})
command+=("--master_port=$port" --module "$module" engine=deepspeed "$@")

# The processes that this comes to; empty where the interpreter cannot count this node's GPUs, by DeepSpeed's own count.
if [[ -z $hostfile ]]; then
    count=$num_gpus
    if [[ -z $count ]]; then
        counting='from deepspeed.accelerator import get_accelerator as found; print(found().device_count())'
        count=$("$python" -c "$counting" 2>/dev/null | tail -n 1) || count=
    fi
    if [[ $count =~ ^[1-9][0-9]*$ ]]; then
        hosts=(localhost)
        slots=("$count")
    fi
fi

# Of a host's GPUs 0 to N-1, how many a list such as node1:0,2@node2 names.
named() {
    local host=$1 total=$2 spec specs gpus='' whole=0 gpu count=0
    IFS=@ read -ra specs <<<"$3"
    for spec in ${specs[@]+"${specs[@]}"}; do
        [[ ${spec%%:*} == "$host" ]] || continue
        if [[ $spec == *:* ]]; then gpus+=,${spec#*:}; else whole=1; fi
    done
    for ((gpu = 0; gpu < total; gpu++)); do
        [[ $gpus, != *,$gpu,* ]] || ((++count))
    done
    if [[ -z $gpus ]]; then count=$((whole * total)); fi
    printf '%s' "$count"
}

world=0
for ((node = 0; node < ${#hosts[@]} && node < ${num_nodes:-${#hosts[@]}}; node++)); do
    gpus=${num_gpus:-${slots[node]}}
    [[ -z $include ]] || gpus=$(named "${hosts[node]}" "$gpus" "$include")
    [[ -z $exclude ]] || gpus=$((gpus - $(named "${hosts[node]}" "$gpus" "$exclude")))
    world=$((world + gpus))
done
((world || ${#hosts[@]} == 0)) || stop "${include:+--include=$include}${exclude:+--exclude=$exclude} leaves no GPU of ${hosts[*]}; write HOST:GPU,GPU@HOST"
((world)) || world=
if ((dry_run)); then
    printf 'PYTHONSAFEPATH=1 OMP_NUM_THREADS=%s ' "$OMP_NUM_THREADS"
    printf '%q ' "${command[@]}"
    printf '\n'
    if [[ -z $world && " $*" != *" parallel.world_size="* ]]; then
        giving=--num-gpus=N
        [[ -z $include$exclude ]] || giving=--hostfile=PATH
        printf 'deepspeed.sh: the plan is for 1 process, since the GPUs of this node cannot be counted here; %s gives their number\n' "$giving" >&2
    fi
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
