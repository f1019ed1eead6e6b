#!/bin/sh
# Starts the SuperNode of device @{id}; made by `fedgen provision`.
set -eu
export PATH="@{environment}/bin:/usr/local/bin:/usr/bin:/bin"
export HOME="@{state}/@{id}"
export FLWR_HOME="@{state}/@{id}/flower"
export FEDGEN_CACHE="@{state}/@{id}/cache"
export HF_HOME="@{state}/@{id}/hub"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
umask 077
cd "@{state}/@{id}"
set -- \
    --superlink "@{address}" \
    --root-certificates "@{config}/@{id}/ca.crt" \
    --auth-supernode-private-key "@{config}/@{id}/device.key" \
    --host 127.0.0.1 --port @{port} \
    --node-config "@{config}/@{id}/node.toml"
if [ "@{warm}" = yes ]; then  # a worker does the work, and nobody without this secret gets it
    if [ ! -s worker.secret ]; then
        head -c 48 /dev/urandom >worker.secret.new
        mv worker.secret.new worker.secret
    fi
    set -- "$@" --isolation process --superexec-auth-secret-file "@{state}/@{id}/worker.secret"
fi
exec "@{environment}/bin/flower-supernode" "$@"
