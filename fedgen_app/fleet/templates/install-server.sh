#!/bin/sh
# Installs the server of fleet @{name}; made by `fedgen provision`. Run it from its own unpacked folder, again after
# every change.
set -eu
@{common}
make_user
target="@{config}/server"
if [ "$files_only" = yes ]; then install -d -m 0755 "@{config}" "@{state}"; else install -d -m 0755 -o root -g root "@{config}" "@{state}"; fi ||
    die "@{config} cannot be made"
folder 0700 "$target"
folder 0700 "$target/devices"
for part in server server/flower server/runs; do folder 0700 "@{state}/$part"; done
place 0644 ca.crt "$target/ca.crt"
place 0644 server.crt "$target/server.crt"
place 0600 server.key "$target/server.key"
place 0600 superexec.secret "$target/superexec.secret"
place 0755 superlink.sh "$target/superlink.sh"
place 0755 superexec.sh "$target/superexec.sh"
restart=$changed
place 0600 config.toml "@{state}/server/flower/config.toml"
# By name: where this was unpacked over an older archive, keys of devices that left lie here too.
for device in @{devices}; do place 0644 "devices/$device.pub" "$target/devices/$device.pub"; done
# Only now those that left: whom `fedgen register` does not find here it unregisters for good.
for key in "$target"/devices/*.pub; do
    case " @{devices} " in *" $(basename "$key" .pub) "*) ;; *) rm -f "$key" ;; esac
done
changed=$restart  # of these two the services read nothing
say "ok: files in $target"

if [ "$files_only" = no ]; then
    place_unit fedgen-superlink
    place_unit fedgen-superexec
    serve fedgen-superlink
    serve fedgen-superexec
@{proxy}fi
say "installed. Now let the SuperLink know the devices:"
say "  runuser -u $user -- env FLWR_HOME=@{state}/server/flower $environment/bin/fedgen register $target --superlink @{name}"
