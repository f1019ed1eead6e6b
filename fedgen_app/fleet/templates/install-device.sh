#!/bin/sh
# Installs device @{id} of fleet @{name}; made by `fedgen provision`. Run it from its own unpacked folder, again after
# every change. An existing policy.toml is left as it is.
set -eu
@{common}
make_user
target="@{config}/@{id}" warm=@{warm}
if [ "$files_only" = yes ]; then install -d -m 0755 "@{config}" "@{state}"; else install -d -m 0755 -o root -g root "@{config}" "@{state}"; fi ||
    die "@{config} cannot be made"
folder 0700 "$target"
folder 0700 "@{state}/@{id}"
place 0644 ca.crt "$target/ca.crt"
place 0600 device.key "$target/device.key"
place 0600 node.toml "$target/node.toml"
place 0755 supernode.sh "$target/supernode.sh"
if [ "$warm" = yes ]; then place 0755 worker.sh "$target/worker.sh"; else rm -f "$target/worker.sh"; fi
if [ -e "$target/policy.toml" ]; then say "ok: $target/policy.toml stays as it is"; else place 0600 policy.toml "$target/policy.toml"; fi
say "ok: files in $target"

"$python" -P -m fedgen_app.fleet.checks policy "$target/policy.toml" || die "see above"
if [ "$files_only" = no ]; then
    runuser -u "$user" -- test -r @{data} || die @{data}" cannot be read by the user $user: chgrp -R $user it and chmod -R g+rX it, and let others enter the folders above"
    say "ok: the data can be read"
    backbone=@{backbone}
    if [ -e "$backbone" ]; then runuser -u "$user" -- "$python" -P -m fedgen_app.fleet.checks readable "$backbone" || die "see above"; fi
fi
if [ "$offline" = no ]; then
    "$python" -P -m fedgen_app.fleet.checks server "@{address}" "$target/ca.crt" || die "the server does not answer as it should; --offline leaves this check out"
fi
if [ "$files_only" = no ]; then
    serve "fedgen-supernode-@{id}"
    if [ "$warm" = yes ]; then
        serve "fedgen-worker-@{id}"
    elif [ -e "/etc/systemd/system/fedgen-worker-@{id}.service" ]; then  # of an earlier installation
        systemctl disable --now "fedgen-worker-@{id}" || die "the service fedgen-worker-@{id} cannot be ended"
        rm "/etc/systemd/system/fedgen-worker-@{id}.service"
    fi
fi
say "installed. What it says: journalctl -f -u 'fedgen-*-@{id}'"
