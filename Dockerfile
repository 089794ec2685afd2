# Two images from one file. Neither runs as root or holds data, keys or the repository's history (.dockerignore lists what goes in).
#
#   docker build --target cpu --tag ssa_pretrain:cpu .
#   mkdir -p outputs && docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/outputs:/run_ssa/outputs" ssa_pretrain:cpu             # the quickstart
#
#   docker build --target gpu --tag ssa_pretrain:gpu .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" --volume "$PWD:/run_ssa" --env WANDB_API_KEY \
#       ssa_pretrain:gpu --nproc-per-node 8 experiment=ssa_1b_8k                                                    # launchers/torchrun.sh
#
# The bases are named by digest, so a build does not change when their owners move a tag. To renew them, look a digest up and give it here:
#   docker buildx imagetools inspect python:3.12-slim
# Another base with torch 2.11 - 2.13 and Transformer Engine: --build-arg GPU_BASE=nvcr.io/nvidia/pytorch:YY.MM-py3@sha256:...
# A bill of materials (SBOM) and the provenance are attached to the image by: docker buildx build --sbom=true --provenance=mode=max ...
# `docker buildx imagetools inspect IMAGE --format '{{ json .SBOM }}'` prints the bill.
#
# Layers go from what changes least to what changes most. A change of the code installs no dependency again.
ARG CPU_BASE=python:3.12-slim@sha256:78387bc3881b8273120a12ebe6c1ab22b018ccc2c9adf565ae1ac9b536e184ea
ARG GPU_BASE=nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1

FROM ${CPU_BASE} AS cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN useradd --uid 10001 --create-home ssa && install --directory --owner ssa --mode 0777 /run_ssa /run_ssa/outputs
WORKDIR /opt/ssa_pretrain
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --constraint constraints.txt --extra-index-url "${TORCH_INDEX}" torch
COPY launchers/requirements.py launchers/
COPY pyproject.toml ./
RUN python launchers/requirements.py quickstart > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --constraint constraints.txt --requirement /tmp/requirements.txt
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --editable .
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HOME=/tmp
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ssa_pretrain, CPU" \
      org.opencontainers.image.description="Pretraining language models with SSA: the quickstart on a CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /run_ssa
USER 10001
ENTRYPOINT ["/opt/ssa_pretrain/launchers/quickstart.sh", "--venv", "/usr/local"]

FROM ${GPU_BASE} AS gpu
RUN useradd --uid 10001 --create-home ssa && install --directory --owner ssa --mode 0777 /run_ssa
WORKDIR /opt/ssa_pretrain
# The base image keeps its own torch, Triton and Transformer Engine: it constrains pip to them. constraints.txt is for CPU builds.
# DeepSpeed is pure Python here (20 MB; operators are built on demand). It is built in this environment because its build looks for torch.
COPY constraints.txt ./
RUN python -m pip install --no-cache-dir --no-build-isolation "$(grep '^deepspeed==' constraints.txt)"
COPY launchers/requirements.py launchers/
COPY pyproject.toml ./
RUN python launchers/requirements.py > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --requirement /tmp/requirements.txt
COPY . .
RUN python -m pip install --no-cache-dir --no-deps --editable .
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 HOME=/tmp
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ssa_pretrain, GPU" \
      org.opencontainers.image.description="Pretraining language models with SSA on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /run_ssa
USER 10001
ENTRYPOINT ["/opt/ssa_pretrain/launchers/torchrun.sh", "--python", "python"]
CMD ["--help"]
