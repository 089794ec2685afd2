#!/usr/bin/env bash
# A whole recipe: data check -> training at 8k -> training at 32k from those weights -> evaluation at four times the length -> export.
#
#   launchers/stages.sh --nproc-per-node 8 --recipe ssa_1b --out DIR data.path=DATA 8k:layout=gpus_8_8k 32k:layout=gpus_8_32k
#   launchers/stages.sh --out DIR --status
#
#   --recipe NAME            both experiments without their length: ssa_1b, full_1b, moba_1b, nsa_1b, ssa_300m, full_300m, moba_300m, nsa_300m
#   --out DIR                the folder of all stages; the state is DIR/stages.json
#   --status                 print the state and exit
#   --dry-run                check all settings; print each stage's command and the plans; start nothing
#   --nproc-per-node, --nnodes, --rdzv-endpoint, --rdzv-id, --python, --max-restarts, --restart-wait    as of launchers/torchrun.sh
#
# KEY=VALUE applies to both training stages, 8k:KEY=VALUE, 32k:KEY=VALUE, evaluation:KEY=VALUE and export:KEY=VALUE to one stage.
# Run the same command again after any interruption to continue. On several nodes run it on each of them.
# SIGTERM, Ctrl-C and SIGHUP stop it with exit code 7, training with a checkpoint. Otherwise its exit code is that of the stage that failed.
set -euo pipefail

# shellcheck source=launchers/interpreter.bash
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/interpreter.bash"
words=()
for word in "$@"; do
    [[ $word == --status ]] || words+=("$word")  # the only flag besides --dry-run without a value
done
find_interpreter "${BASH_SOURCE[0]}" ${words[@]+"${words[@]}"}
exec "$python" -m ssa_pretrain.launch stages "$@"
