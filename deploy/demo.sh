#!/usr/bin/env bash
# A whole fleet on this machine, for a few minutes: SuperLink and SuperExec, nginx, three devices with keys and data of
# their own, each a SuperNode and its warm worker. Runs the bundled language job over them, checks what came out, and
# takes everything down. Needs an environment with fedgen-edge (.venv, or FEDGEN_ENVIRONMENT=FOLDER) and nginx
# (FEDGEN_NGINX=FILE where it is not on PATH). Nothing listens beyond loopback; nothing is left, but with --keep, and
# where a step fails, its folder.
set -euo pipefail

usage() { echo "usage: deploy/demo.sh [--no-proxy] [--keep]   (--no-proxy: without nginx; --keep: leaves the folder)"; }
proxy=true keep=no
for argument in "$@"; do
    case "$argument" in
        --no-proxy) proxy=false ;;
        --keep) keep=yes ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

root=$(cd "$(dirname "$0")/.." && pwd)
environment=${FEDGEN_ENVIRONMENT:-$root/.venv}
python=$environment/bin/python
fedgen=$environment/bin/fedgen
nginx=${FEDGEN_NGINX:-$(command -v nginx || true)}
devices=(north east south)
rounds=5
threads=$((($(nproc) + ${#devices[@]} - 1) / ${#devices[@]}))  # the devices share this machine's processors
began=$SECONDS step=0 failed=yes interrupted=no groups=()

say() { printf '    %s\n' "$*"; }
step() { step=$((step + 1)); printf '[%3d s] %d. %s\n' "$((SECONDS - began))" "$step" "$*"; }
die() { printf 'demo.sh: %s\n' "$*" >&2; exit 1; }

[ -x "$python" ] && [ -x "$fedgen" ] ||
    die "no fedgen-edge in $environment: run 'make run' or 'make test' once, or set FEDGEN_ENVIRONMENT to its folder"
if [ "$proxy" = true ] && ! [ -x "$nginx" ]; then
    die "nginx is missing: apt install nginx, or FEDGEN_NGINX=/path/to/nginx; --no-proxy tries the fleet without it"
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/fedgen-demo.XXXXXX")

take_down() {
    local status=$? group
    trap - EXIT INT TERM
    step "Taking everything down"
    for group in ${groups[@]+"${groups[@]}"}; do kill -TERM -- "-$group" 2>/dev/null || true; done
    # What is left after a moment is killed: by its group, and by the mark in its environment.
    for _ in $(seq 80); do
        local left=no
        for group in ${groups[@]+"${groups[@]}"}; do if kill -0 -- "-$group" 2>/dev/null; then left=yes; fi; done
        if [ "$left" = no ]; then break; fi
        sleep 0.1
    done
    for group in ${groups[@]+"${groups[@]}"}; do kill -KILL -- "-$group" 2>/dev/null || true; done
    "$python" -P -c 'import sys; from pathlib import Path; from fedgen_app.engines.keeper import end_processes
end_processes(Path(sys.argv[1]))' "$work" || true
    wait
    if [ "$failed" = yes ] && [ "$interrupted" = no ]; then  # who interrupts it does not ask why
        for log in "$work"/logs/*; do [ -s "$log" ] && { echo "--- $(basename "$log")"; tail -n 12 "$log"; }; done >&2
        keep=yes
    fi
    if [ "$keep" = yes ]; then say "kept: $work"; else rm -rf "$work"; fi
    if [ "$failed" = yes ]; then
        printf '[%3d s] failed\n' "$((SECONDS - began))" >&2
        [ "$status" -ne 0 ] || status=1
    else
        printf '[%3d s] done\n' "$((SECONDS - began))"
    fi
    exit "$status"
}
trap take_down EXIT
trap 'interrupted=yes; exit 130' INT
trap 'interrupted=yes; exit 143' TERM

start() {  # start NAME COMMAND...: in a process group of its own, as a service would
    local name=$1
    shift
    FEDGEN_SIMULATION=$work FLWR_HOME=$work/var/server/flower setsid "$@" >"$work/logs/$name.log" 2>&1 &
    groups+=("$!")
    say "$name: process $!"
}

until_listening() {  # until_listening PORT NAME
    for _ in $(seq 600); do
        if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then return; fi
        kill -0 "${groups[-1]}" 2>/dev/null || die "$2 ended"
        sleep 0.1
    done
    die "$2 does not listen within a minute"
}

operator() { FLWR_HOME=$work/var/server/flower "$fedgen" "$@"; }

step "Data: the bundled texts, one kind for each device"
mkdir "$work/logs"
"$python" -P - "$work" "${devices[@]}" <<'PYTHON'
import collections, json, pathlib, sys
import fedgen_assets, pyarrow.parquet

work, devices = pathlib.Path(sys.argv[1]), sys.argv[2:]
texts = collections.defaultdict(list)
for row in pyarrow.parquet.read_table(fedgen_assets.path("topics") / "train.parquet").to_pylist():
    texts[row["topic"]].append(row["text"])
for device, topic in zip(devices, sorted(texts), strict=False):
    folder = work / "data" / device
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in texts[topic]]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"    {device}: {len(lines)} texts, {topic}")
PYTHON

step "fedgen provision: certificates, keys, start scripts, an archive per machine"
read -r port superlink first second third < <("$python" -P -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(5)]
print(*(s.getsockname()[1] for s in sockets))')
runtime=("$first" "$second" "$third")
{
    printf 'name = "demo"\n[server]\nhosts = ["localhost"]\nport = %d\nsuperlink-port = %d\nproxy = %s\n' \
        "$port" "$superlink" "$proxy"
    printf '[paths]\nconfig = "%s"\nstate = "%s"\nenvironment = "%s"\n' "$work/etc" "$work/var" "$environment"
    for i in "${!devices[@]}"; do
        printf '[[device]]\nid = "%s"\ndata = "%s"\nbackbone = "bundled"\nport = %d\nthreads = %d\n' \
            "${devices[i]}" "$work/data/${devices[i]}" "${runtime[i]}" "$threads"
    done
} >"$work/fleet.toml"
"$fedgen" provision "$work/fleet.toml" --output "$work/demo" | sed 's/^/    /'

step "install.sh of the server and of each device, from the archives"
mkdir "$work/unpacked"
for machine in server "${devices[@]}"; do
    archive=$work/demo/devices/$machine.tar
    if [ "$machine" = server ]; then archive=$work/demo/server.tar; fi
    tar -xf "$archive" -C "$work/unpacked"
    offline=()
    if [ "$machine" != server ]; then offline=(--offline); fi
    "$work/unpacked/fedgen-$machine/install.sh" --files-only ${offline[@]+"${offline[@]}"} >"$work/logs/install-$machine.log"
    say "$machine: $(grep -c '^ok' "$work/logs/install-$machine.log") steps ok"
done

step "SuperLink (process isolation, TLS, node authentication), SuperExec$([ "$proxy" = true ] && echo ', nginx')"
start superlink "$work/etc/server/superlink.sh"
until_listening "$superlink" "the SuperLink"
start superexec "$work/etc/server/superexec.sh"
if [ "$proxy" = true ]; then
    mkdir "$work/nginx"
    {
        echo "daemon off; pid $work/nginx/pid; error_log $work/logs/nginx-error.log;"
        echo "events {} http { access_log $work/logs/nginx-access.log;"
        for kind in client_body proxy fastcgi uwsgi scgi; do echo "${kind}_temp_path $work/nginx/$kind;"; done
        # On loopback alone, here: what the configuration of a real server opens to the net.
        sed -e '/listen \[::\]/d' -e "s/listen $port ssl/listen 127.0.0.1:$port ssl/" "$work/demo/server/nginx.conf"
        echo "}"
    } >"$work/nginx/nginx.conf"
    start nginx "$nginx" -p "$work/nginx" -c "$work/nginx/nginx.conf"
    until_listening "$port" nginx
fi

step "fedgen register: the SuperLink learns the devices' public keys"
operator register "$work/etc/server" --superlink demo | sed 's/^/    /'

step "Devices: a SuperNode and a warm worker each"
for device in "${devices[@]}"; do
    start "$device-supernode" "$work/etc/$device/supernode.sh"
    start "$device-worker" "$work/etc/$device/worker.sh"
done

step "fedgen run: $rounds rounds of the bundled language job"
cd "$root"
operator run "$root" --superlink demo --preset quickstart --set expected-clients=3 --set "num-server-rounds=$rounds" \
    --set max-steps=10 --set personal.max-steps=10 --set test-sequences=64 --set samples.count=0 --output "$work/run" 2>"$work/logs/run.log" | sed 's/^/    /' || die "the run failed"

step "Checks"
"$python" -P - "$work" "$proxy" "$rounds" "${devices[@]}" <<'PYTHON'
import json, pathlib, re, sys

work, proxy, rounds, devices = pathlib.Path(sys.argv[1]), sys.argv[2] == "true", int(sys.argv[3]), sys.argv[4:]
found = json.loads((work / "run" / "results.json").read_text())
metric = "word_perplexity"
frozen, final = found["frozen"][metric], found["final"]["metrics"][metric]
kept = {d: len(list((work / "var" / d / "adapters").glob("*/*/adapter_model.safetensors"))) for d in devices}
log = work / "logs" / "nginx-access.log"
paths = set(re.findall(r'"POST (/v1/[a-z]+/)', log.read_text())) if proxy else {"/v1/fleet/"}
checks = {
    "the run completed": found["status"] == "completed",
    f"{rounds} rounds, each with all {len(devices)} devices": [r["clients"] for r in found["rounds"]] == [sorted(devices)] * rounds,
    f"the global adapter helps: word perplexity {frozen:.0f} -> {final:.0f}": final < frozen,
    "every device keeps its personal adapter": set(kept.values()) == {1},
    "the server holds none of them": not list((work / "run").glob("clients/*/adapter_model.safetensors")),
    f"nginx passed {', '.join(sorted(paths))} and nothing else" if proxy else "without nginx": paths == {"/v1/fleet/"},
}
for what, ok in checks.items():
    print(f"    {'ok  ' if ok else 'BAD '} {what}")
seconds = " ".join(f"{r['seconds']:.1f}" for r in found["rounds"])
print(f"    seconds of each round: {seconds}; a device sends {found['final']['uplink_bytes_per_client_round'] / 1000:.1f} kB")
sys.exit(not all(checks.values()))
PYTHON
failed=no
