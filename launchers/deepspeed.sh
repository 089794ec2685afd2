#!/usr/bin/env bash
# Training with DeepSpeed's own launcher, on one node or on those of a hostfile; engine=deepspeed is added.
#
#   launchers/deepspeed.sh --num-gpus 8 experiment=ssa_1b_8k data.path=DIR
#   launchers/deepspeed.sh --hostfile hosts experiment=ssa_1b_8k data.path=DIR parallel=tp2_sp deepspeed.zero_stage=2
#
#   --num-gpus N        processes on each node, one per GPU (or on the CPU)  (NUM_GPUS, or every GPU)
#   --num-nodes N       nodes of the hostfile that are used                  (NUM_NODES, or all of them)
#   --hostfile PATH     lines "HOST slots=GPUS"; the nodes are reached by ssh, pdsh if it is there    (HOSTFILE; none: this node)
#   --include SPEC, --exclude SPEC    nodes and GPUs, as DeepSpeed writes them: node1:0,2@node2
#   --master-port PORT  where the processes meet                             (MASTER_PORT; a free one on one node, else 29500)
#   --python PATH       the interpreter                                      (PYTHON, or python3)
#   --module NAME       the entry point                                      (ssa_pretrain.train)
#   --max-restarts N    restarts in a row after a crash, a hang or a killed rank     (MAX_RESTARTS, or 3)
#   --restart-wait SECONDS    before the first of them; each next wait is twice as long    (RESTART_WAIT, or 5)
#   --dry-run           print the exact command, the run's plan and DeepSpeed's configuration; start nothing
#
# --num_gpus=8 is the same. A flag takes precedence over the variable in brackets. The arguments after the flags go to the entry point unchanged.
# To resume, run the same command again.
# SIGTERM, Ctrl-C and SIGHUP stop all ranks after the same step with a checkpoint (exit code 7). They are killed if that takes more than
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (600); a second Ctrl-C kills them at once. On several nodes DeepSpeed's launcher gives them 30 seconds.
set -euo pipefail

# shellcheck source=launchers/interpreter.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/interpreter.bash"
find_interpreter "${BASH_SOURCE[0]}" "$@"
exec "$python" -m ssa_pretrain.launch deepspeed "$@"
