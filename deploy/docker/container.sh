#!/usr/bin/env bash
# The entry point of PreFT Serve's images: waits for what a process needs, and starts the process.
#
#   head          the head of the Ray cluster; makes the secrets that are missing in /run/preft
#   node ROLE     a node of the Ray cluster with room for one worker: prefill, decode or colocated
#   serve         preft serve: starts the workers on the nodes, restarts them, and is a gateway
#   gateway       preft gateway
#   healthy       whether this container's process works
#   COMMAND ...   any other command, such as preft or bash
#
# PREFT_RAY_ADDRESS is the head's host:port, RAY_REDIS_ADDRESS that of a Redis without a password, if the head has one.
# Arguments after the first go to the process.
set -euo pipefail

SECRETS=/run/preft
GPUS=/var/lib/preft/gpus # one lock file per GPU of this machine
ROLE=/tmp/container-role

say() { echo "container: $*" >&2; }

wait_until() { # WHAT COMMAND...: waits until COMMAND succeeds
  local what=$1
  shift
  "$@" && return
  say "waiting for $what"
  until "$@"; do sleep 1; done
}

has_secret() { [[ -s $SECRETS/$1 ]]; }

answers() { (exec 3<>"/dev/tcp/${1%:*}/${1##*:}") 2>/dev/null; } # HOST:PORT

redis_address() { # of the URL in $SECRETS/state
  local place
  place=$(<"$SECRETS/state")
  place=${place#*://}
  place=${place#*@}
  echo "${place%%/*}"
}

wait_for_secrets() { for name in "$@"; do wait_until "$SECRETS/$name" has_secret "$name"; done; }

wait_for_redis() {
  local address
  address=$(redis_address)
  wait_until "Redis at $address" answers "$address"
}

make_secrets() { # complete files alone get their names: other containers wait for them
  local password
  wait_until "permission to write $SECRETS" test -w "$SECRETS"
  for name in cluster_secret ray_token redis_password; do
    has_secret "$name" || put "$name" "$(random)"
  done
  password=$(<"$SECRETS/redis_password")
  has_secret state || put state "redis://:$password@${REDIS_ADDRESS:-redis:6379}/0"
  has_secret redis.conf || put redis.conf "requirepass $password"
  chmod a+r "$SECRETS/redis.conf" # Redis has another user; no other container has this volume
}

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

put() { (umask 077 && echo "$2" >"$SECRETS/.$1" && mv "$SECRETS/.$1" "$SECRETS/$1"); }

start_ray() { # the arguments of `ray start`. With EXEC=exec, it is this process, and gets the container's signals
  local address # in the network in which NAME is known: a head has two
  address=$(getent hosts "${NAME:-$HOSTNAME}" || hostname -I)
  ${EXEC:-} ray start --disable-usage-stats --log-color=false --node-ip-address="${address%% *}" \
    --object-store-memory=80000000 "$@"
}

join_ray() { # the arguments of `ray start`, on a node
  wait_for_secrets ray_token
  wait_until "the head of Ray at $PREFT_RAY_ADDRESS" answers "$PREFT_RAY_ADDRESS"
  start_ray --address="$PREFT_RAY_ADDRESS" --num-cpus="${NODE_CPUS:-1}" "$@"
}

claim_gpu() { # one GPU that no other container of this machine has, until this process ends
  mkdir -p "$GPUS"
  local gpu lock
  while true; do
    for gpu in $(nvidia-smi --query-gpu=index --format=csv,noheader); do
      exec {lock}>"$GPUS/$gpu"
      if flock --nonblock "$lock"; then
        export CUDA_VISIBLE_DEVICES=$gpu CUDA_DEVICE_ORDER=PCI_BUS_ID # the order of nvidia-smi
        say "takes the GPU $gpu"
        return
      fi
      exec {lock}>&-
    done
    say "waiting for a GPU: other containers have all GPUs of this machine"
    sleep 10
  done
}

runs() { # NAME: whether a process has this name
  local name
  for name in /proc/[0-9]*/comm; do
    [[ $(cat "$name" 2>/dev/null) == "$1" ]] && return
  done
  return 1
}

is_ready() { # of a gateway
  local status
  exec 3<>"/dev/tcp/127.0.0.1/${PREFT_PORT:-8000}"
  printf 'GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3
  read -r _ status _ <&3
  [[ $status == 200 ]]
}

healthy() {
  case $(cat "$ROLE" 2>/dev/null) in
    head) answers "127.0.0.1:${PREFT_RAY_ADDRESS##*:}" && runs raylet ;;
    node) runs raylet ;;
    serve) runs raylet && is_ready ;;
    gateway) is_ready ;;
    *) true ;;
  esac
}

command=${1:-}
case $command in
  head)
    make_secrets
    echo head >"$ROLE"
    if [[ -n ${RAY_REDIS_ADDRESS:-} ]]; then # Ray's tables are there, so that nodes and workers outlive this container
      wait_until "Redis at $RAY_REDIS_ADDRESS" answers "$RAY_REDIS_ADDRESS"
    fi
    NAME=${PREFT_RAY_ADDRESS%:*} EXEC=exec start_ray --head --port="${PREFT_RAY_ADDRESS##*:}" --num-cpus=0 \
      --include-dashboard=false --block --redis-password= "${@:2}"
    ;;
  node)
    role=$2
    echo node >"$ROLE"
    gpus=0
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null; then
      claim_gpu
      gpus=1
    fi
    # At SIGTERM, Ray drains the node: its worker ends its requests, and others go on elsewhere.
    EXEC=exec join_ray --num-gpus="$gpus" --resources="{\"$role\": 1}" --block "${@:3}"
    ;;
  serve)
    echo serve >"$ROLE"
    wait_for_secrets state cluster_secret
    wait_for_redis
    NODE_CPUS=0 join_ray --num-gpus=0
    exec preft serve "${@:2}"
    ;;
  gateway)
    echo gateway >"$ROLE"
    wait_for_secrets state cluster_secret
    wait_for_redis
    exec preft gateway "${@:2}"
    ;;
  healthy) healthy ;;
  *) exec "$@" ;;
esac
