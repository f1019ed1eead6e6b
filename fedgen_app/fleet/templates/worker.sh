#!/bin/sh
# Starts the warm worker of device @{id}, which trains for its SuperNode; made by `fedgen provision` @{version}.
@{common}
exec "@{environment}/bin/fedgen" device-worker \
    --runtime "127.0.0.1:@{port}" --secret "@{state}/@{id}/worker.secret" \
    --ca "@{state}/@{id}/loopback/ca.crt"
