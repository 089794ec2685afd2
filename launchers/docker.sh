#!/usr/bin/env bash
# Rendered by: python -m ssa_pretrain.launch render target=docker spec=launchers/spec.yaml nodes=1 'hosts=[]' -- layout=gpus_8_8k
# Run this on the node. To resume, run it again.
# Variables that must be set: WANDB_API_KEY.
set -euo pipefail

exec docker run --rm --name ssa_1b_8k --gpus 8 --network host --ipc host --ulimit memlock=-1 \
    --ulimit stack=67108864 --user "$(id -u):$(id -g)" --stop-timeout 630 \
    --env TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 --env NCCL_DEBUG=WARN --env WANDB_API_KEY \
    --volume /shared/data:/shared/data:ro --volume /shared/runs:/shared/runs \
    --entrypoint /opt/ssa_pretrain/launchers/torchrun.sh registry.example.org/lab/ssa_pretrain:gpu \
    --nproc-per-node 8 --python python3 experiment=ssa_1b_8k output_dir=/shared/runs/ssa_1b_8k \
    data.path=/shared/data/smollm logging=wandb layout=gpus_8_8k
