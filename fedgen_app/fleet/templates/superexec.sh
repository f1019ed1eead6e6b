#!/bin/sh
# Starts the SuperExec of fleet @{name}, which runs the ServerApp; made by `fedgen provision` @{version}.
@{common}
exec "@{environment}/bin/flower-superexec" \
    --runtime-api-address "@{superlink_address}" \
    --root-certificates "@{config}/server/ca.crt" \
    --superexec-auth-secret-file "@{config}/server/superexec.secret"
