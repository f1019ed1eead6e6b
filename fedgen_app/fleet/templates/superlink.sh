#!/bin/sh
# Starts the SuperLink of fleet @{name}; made by `fedgen provision` @{version}. It listens on this machine's loopback only.
@{common}
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
