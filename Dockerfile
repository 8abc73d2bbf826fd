# draftune in a container. It was checked by a linter and never built.
#
#   docker build -t draftune .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" -v draftune-cache:/cache draftune train --config sd14-16gb
#
# On Linux pip installs torch for NVIDIA GPUs. For torch's CPU build, name the index of torch's installation page:
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t draftune-cpu .
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY src ./src
RUN pip install -c constraints.txt ".[data,hpsv2,plots,preflight,quant,tensorboard]" \
    && useradd --create-home --uid 1000 user \
    && mkdir -p /work/runs /cache \
    && chown -R user /work /cache

USER 1000
WORKDIR /work
ENTRYPOINT ["draftune"]
CMD ["--help"]
