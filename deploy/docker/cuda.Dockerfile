# PreFT Serve with vLLM's GPU build, for CUDA 13 (driver 580 or newer) and NVIDIA's container toolkit. Built from the repository's root:
#   docker build -f deploy/docker/cuda.Dockerfile -t preft-serve:cuda .
ARG BASE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04

FROM ${BASE} AS builder
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ARG UV=uv==0.13.9
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir "${UV}"
ENV PATH=/opt/uv/bin:$PATH UV_LINK_MODE=copy UV_NO_CACHE=1

# The dependencies have a layer of their own: a change of the code leaves it as it is.
WORKDIR /src
COPY pyproject.toml ./
COPY scripts scripts
COPY deploy/docker/constraints-gpu.txt ./
RUN UV_CONSTRAINT=/src/constraints-gpu.txt python3 scripts/install.py --dependencies --extra gpu --venv /opt/preft/packages \
    && uv pip uninstall --python /opt/preft/packages/bin/python pip

COPY README.md LICENSE ./
COPY services services
COPY kernels kernels
COPY loadgen loadgen
RUN /opt/uv/bin/pip --python /opt/preft/packages/bin/python install --no-cache-dir --no-deps --target /opt/preft/code .

# Triton, which vLLM's and PreFT Serve's kernels use, compiles a C file for each kernel when it first runs. So this
# image can't do without a C compiler and Python's headers.
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates gcc libc6-dev libnuma1 python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home preft \
    && install -d -o preft -g preft /var/lib/preft /run/preft /etc/preft/tls /home/preft/.cache
COPY --from=builder /opt/preft/packages /opt/preft/packages
COPY --from=builder /opt/preft/code /opt/preft/code
COPY --chmod=755 deploy/docker/container.sh /usr/local/bin/preft-container
RUN echo /opt/preft/code >/opt/preft/packages/lib/python3.12/site-packages/preft.pth \
    && ln -s /opt/preft/packages/bin/ray /opt/preft/code/bin/preft /usr/local/bin/

ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="PreFT Serve (CUDA)" \
      org.opencontainers.image.description="Serves many prefill-only finetunes of one base model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENV PATH=/opt/preft/packages/bin:$PATH \
    PREFT_STATE_DIR=/var/lib/preft \
    TRITON_CACHE_DIR=/home/preft/.cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
WORKDIR /home/preft
HEALTHCHECK --interval=10s --timeout=10s --start-period=10m --retries=6 CMD ["preft-container", "healthy"]
ENTRYPOINT ["tini", "--", "preft-container"]
CMD ["preft", "--help"]
