# PreFT Serve with vLLM's CPU build. Built from the repository's root:
#   docker build -f deploy/docker/cpu.Dockerfile -t preft-serve:cpu .
ARG BASE=docker.io/library/debian:12.12-slim

FROM ${BASE} AS builder
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ARG UV=uv==0.13.9
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir "${UV}"
ENV PATH=/opt/uv/bin:$PATH UV_LINK_MODE=copy UV_NO_CACHE=1

# The dependencies have a layer of their own: a change of the code leaves it as it is.
WORKDIR /src
COPY pyproject.toml ./
COPY scripts scripts
COPY deploy/docker/constraints-cpu.txt ./
RUN UV_CONSTRAINT=/src/constraints-cpu.txt python3 scripts/install.py --dependencies --extra cpu --venv /opt/preft/packages \
    && uv pip uninstall --python /opt/preft/packages/bin/python pip

COPY README.md LICENSE ./
COPY services services
COPY kernels kernels
COPY loadgen loadgen
RUN /opt/uv/bin/pip --python /opt/preft/packages/bin/python install --no-cache-dir --no-deps --target /opt/preft/code .

FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libnuma1 python3 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --create-home preft \
    && install -d -o preft -g preft /var/lib/preft /run/preft /etc/preft/tls /home/preft/.cache
COPY --from=builder /opt/preft/packages /opt/preft/packages
COPY --from=builder /opt/preft/code /opt/preft/code
COPY --chmod=755 deploy/docker/container.sh /usr/local/bin/preft-container
RUN echo /opt/preft/code >/opt/preft/packages/lib/python3.11/site-packages/preft.pth \
    && ln -s /opt/preft/packages/bin/ray /opt/preft/code/bin/preft /usr/local/bin/

ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="PreFT Serve (CPU)" \
      org.opencontainers.image.description="Serves many prefill-only finetunes of one base model" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENV PATH=/opt/preft/packages/bin:$PATH \
    PREFT_STATE_DIR=/var/lib/preft
USER 10001:10001
WORKDIR /home/preft
HEALTHCHECK --interval=10s --timeout=10s --start-period=10m --retries=6 CMD ["preft-container", "healthy"]
ENTRYPOINT ["tini", "--", "preft-container"]
CMD ["preft", "--help"]
