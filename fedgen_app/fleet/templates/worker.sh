#!/bin/sh
# Starts the warm worker of device @{id}, which trains for its SuperNode; made by `fedgen provision`.
set -eu
export PATH="@{environment}/bin:/usr/local/bin:/usr/bin:/bin"
export HOME="@{state}/@{id}"
export FLWR_HOME="@{state}/@{id}/flower"
export FEDGEN_CACHE="@{state}/@{id}/cache"
export HF_HOME="@{state}/@{id}/hub"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
umask 077
cd "@{state}/@{id}"
exec "@{environment}/bin/fedgen" device-worker \
    --runtime "127.0.0.1:@{port}" --secret "@{state}/@{id}/worker.secret"
