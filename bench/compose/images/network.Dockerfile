# Runs for a moment in the network of another container, and cuts it.
ARG BASE=docker.io/library/debian:12.12-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends iptables \
    && rm -rf /var/lib/apt/lists/*
