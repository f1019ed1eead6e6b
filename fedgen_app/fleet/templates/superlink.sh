#!/bin/sh
# Starts the SuperLink of fleet @{name}; made by `fedgen provision`. It listens on this machine's loopback only.
set -eu
export PATH="@{environment}/bin:/usr/local/bin:/usr/bin:/bin"
export HOME="@{state}/server"
export FLWR_HOME="@{state}/server/flower"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 PYTHONUNBUFFERED=1
umask 077
cd "@{state}/server"
exec "@{environment}/bin/flower-superlink" \
    --host "@{superlink_host}" --port @{superlink_port} \
    --ssl-ca-certfile "@{config}/server/ca.crt" \
    --ssl-certfile "@{config}/server/server.crt" \
    --ssl-keyfile "@{config}/server/server.key" \
    --enable-supernode-auth \
    --database "@{state}/server/state.db" \
    --disable-runtime-dependency-installation \
    --isolation process \
    --superexec-auth-secret-file "@{config}/server/superexec.secret"
