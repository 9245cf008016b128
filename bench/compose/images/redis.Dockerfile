# In place of Docker's Redis image where no registry is reached: Debian's Redis, started as that image starts it.
ARG BASE=docker.io/library/debian:12.12-slim
FROM ${BASE}
RUN apt-get update \
    && apt-get install -y --no-install-recommends redis-server \
    && rm -rf /var/lib/apt/lists/* \
    && printf '#!/bin/sh\nchown -R redis /data\nexec setpriv --reuid=redis --regid=redis --clear-groups "$@"\n' \
        >/usr/local/bin/docker-entrypoint.sh \
    && chmod +x /usr/local/bin/docker-entrypoint.sh \
    && install -d -o redis -g redis /data
VOLUME /data
WORKDIR /data
