#!/bin/sh
# Starts the SuperNode of device @{id}; made by `fedgen provision` @{version}.
@{common}
# What it says to its own processes on loopback is under TLS too, with a certificate that is made at each start.
loopback="@{state}/@{id}/loopback"
"@{environment}/bin/python" -P -m fedgen_app.fleet.loopback "$loopback"
set -- \
    --ssl-certfile "$loopback/server.crt" \
    --ssl-keyfile "$loopback/server.key" \
    --ssl-ca-certfile "$loopback/ca.crt" \
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
exec "@{environment}/bin/fedgen-supernode" "$@"
