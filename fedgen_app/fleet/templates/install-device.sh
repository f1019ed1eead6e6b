#!/bin/sh
# Installs device @{id} of fleet @{name}; made by `fedgen provision`. Run it from its own unpacked folder, again after
# every change. An existing policy.toml is left as it is.
set -eu
@{common}
for path in @{paths}; do seen "$path"; done
make_user
target="@{config}/@{id}" warm=@{warm} common_key=@{common_key}
if [ "$files_only" = yes ]; then install -d -m 0755 "@{config}" "@{state}"; else install -d -m 0755 -o root -g root "@{config}" "@{state}"; fi ||
    die "@{config} cannot be made"
folder 0700 "$target"
folder 0700 "@{state}/@{id}"
place 0644 ca.crt "$target/ca.crt"
place 0600 device.key "$target/device.key"
place 0600 node.toml "$target/node.toml"
if [ "$common_key" = yes ]; then place 0600 cluster.key "$target/cluster.key"; fi
place 0755 supernode.sh "$target/supernode.sh"
if [ "$warm" = yes ]; then place 0755 worker.sh "$target/worker.sh"; else rm -f "$target/worker.sh"; fi
if [ -e "$target/policy.toml" ]; then say "ok: $target/policy.toml stays as it is"; else place 0600 policy.toml "$target/policy.toml"; fi
say "ok: files in $target"

"$python" -P -m fedgen_app.fleet.checks policy "$target/policy.toml" || die "see above"
if [ "$files_only" = no ]; then
    [ -e @{data} ] || die @{data}" is not there"
    for path in @{paths}; do
        if [ -e "$path" ]; then runuser -u "$user" -- "$python" -P -m fedgen_app.fleet.checks readable "$path" || die "see above"; fi
    done
fi
if [ "$offline" = no ]; then
    "$python" -P -m fedgen_app.fleet.checks server "@{address}" "$target/ca.crt" || die "the server does not answer as it should; --offline leaves this check out"
fi
if [ "$files_only" = no ]; then
    place_unit "fedgen-supernode-@{id}"
    if [ "$warm" = yes ]; then  # before the SuperNode, for which it waits: that may be refused, and comes back by itself
        place_unit "fedgen-worker-@{id}"
        serve "fedgen-worker-@{id}"
    elif [ -e "$units/fedgen-worker-@{id}.service" ]; then  # of an earlier installation
        systemctl disable --now "fedgen-worker-@{id}.service" || die "the service fedgen-worker-@{id} cannot be ended"
        rm "$units/fedgen-worker-@{id}.service"
    fi
    serve "fedgen-supernode-@{id}" "SuperNode ID:" \
        " (if the SuperLink does not know this device yet: fedgen register, on the server; the service tries again by itself)"
fi
say "installed. What it says: journalctl -f -u 'fedgen-*-@{id}'"
