#!/bin/sh
# Starts the SuperExec of fleet @{name}, which runs the ServerApp; made by `fedgen provision`.
set -eu
export PATH="@{environment}/bin:/usr/local/bin:/usr/bin:/bin"
export HOME="@{state}/server"
export FLWR_HOME="@{state}/server/flower"
export FEDGEN_CACHE="@{state}/server/cache"
export HF_HOME="@{state}/server/hub"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
umask 077
cd "@{state}/server"
exec "@{environment}/bin/flower-superexec" \
    --runtime-api-address "@{superlink_address}" \
    --root-certificates "@{config}/server/ca.crt" \
    --superexec-auth-secret-file "@{config}/server/superexec.secret"
