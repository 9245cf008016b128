# In place of Prometheus' image where no registry is reached: Debian's Prometheus.
ARG BASE=docker.io/library/debian:12.12-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends prometheus wget \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o nobody -g nogroup /prometheus
USER 65534:65534
ENTRYPOINT ["prometheus"]
