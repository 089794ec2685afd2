#!/usr/bin/env bash
# Training with torchrun, on one node or on several that meet through a c10d rendezvous.
#
#   launchers/torchrun.sh --nproc-per-node 8 experiment=ssa_1b_8k parallel=dp
#   launchers/torchrun.sh --nnodes 4 --nproc-per-node 8 --rdzv-endpoint node0:29400 experiment=ssa_1b_8k    # on each node
#
#   --nproc-per-node N       processes on this node, one per GPU         (NPROC_PER_NODE, or auto: every GPU)
#   --nnodes N               nodes                                       (NNODES, or 1)
#   --rdzv-endpoint HOST:PORT  one of the nodes; all must reach it       (RDZV_ENDPOINT; needed for more than one node)
#   --rdzv-id NAME           distinguishes jobs on one endpoint          (RDZV_ID, or ssa_pretrain)
#   --python PATH            the interpreter                             (PYTHON, or python3)
#   --module NAME            the entry point                             (ssa_pretrain.train)
#   --max-restarts N         restarts in a row after a crash, a hang or a killed rank   (MAX_RESTARTS, or 3)
#   --restart-wait SECONDS   before the first of them; each next wait is twice as long  (RESTART_WAIT, or 5)
#   --dry-run                print the exact command and the run's plan; start nothing
#
# --nproc_per_node=8 is the same. A flag takes precedence over the variable in brackets. The arguments after the flags go to the entry point unchanged.
# To resume, run the same command again.
# SIGTERM, Ctrl-C and SIGHUP stop all ranks after the same step with a checkpoint (exit code 7). They are killed if that takes more than
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (600); a second Ctrl-C kills them at once.
set -euo pipefail

# shellcheck source=launchers/interpreter.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/interpreter.bash"
find_interpreter "${BASH_SOURCE[0]}" "$@"
exec "$python" -m ssa_pretrain.launch torchrun "$@"
