say() { printf '%s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

files_only=no offline=no
for argument in "$@"; do
    case "$argument" in
        --files-only) files_only=yes ;;
        --offline) offline=yes ;;
        *) die "$argument: no such option; --files-only places files without user and services, --offline does not try the server" ;;
    esac
done

here=$(cd "$(dirname "$0")" && pwd)
environment="@{environment}" user="@{user}"
if [ "$files_only" = no ]; then
    [ "$(id -u)" = 0 ] || die "has to be run as root (or with --files-only)"
    for tool in systemctl useradd runuser; do
        command -v "$tool" >/dev/null || die "$tool is missing: this needs a Linux with systemd"
    done
fi
seen() {  # seen PATH: the services have a /tmp and a /var/tmp of their own (PrivateTmp)
    if [ "$files_only" = yes ]; then return; fi
    case "$1/" in /tmp/*|/var/tmp/*) die "$1: the services do not see what lies there; lay it elsewhere, and say where in the fleet file" ;; esac
}
seen "$environment"
command -v install >/dev/null || die "install is missing: it is part of coreutils"

python="$environment/bin/python" wheel="fedgen_edge-@{version}-py3-none-any.whl"
get="lay $wheel beside install.sh and run it again (docs/deploy.md says how it is built)"
installed() { "$python" -P -c 'from importlib.metadata import version; print(version("fedgen-edge"))' 2>/dev/null || echo none; }
[ -x "$python" ] || die "$python is not there; make it: python3 -m venv $environment, then $get"
"$python" -c 'import sys; sys.exit(3 if sys.version_info < (3, 11) else 0)' || [ "$?" != 3 ] ||
    die "$("$python" --version) in $environment: fedgen-edge needs 3.11 or newer; make it with such a one: python3.11 -m venv $environment"
changed=no  # whether services have to start anew: a restart of the SuperExec ends the run under way
found=$(installed)
if [ "$found" != "@{version}" ]; then  # a wheel that was copied here, itself or beside the archive, before any index
    for file in "$here/$wheel" "$here/../$wheel"; do
        if [ -f "$file" ]; then
            say "installing $file in $environment"
            "$environment/bin/pip" install "$file" || die "$file cannot be installed in $environment, see above"
            found=$(installed) changed=yes
            break
        fi
    done
fi
[ "$found" != none ] || die "fedgen-edge is not installed in $environment: $get"
[ "$found" = "@{version}" ] || die "$environment has fedgen-edge $found, the fleet has @{version}: $get"
for program in @{programs}; do
    [ -x "$environment/bin/$program" ] || die "$environment/bin/$program is missing; install fedgen-edge there again"
done
say "ok: fedgen-edge $found in $environment"
times=$("$python" -P -c 'import time; from importlib.metadata import distribution as d
placed = next(f for f in d("fedgen-edge").files or () if f.name == "RECORD").locate().stat().st_mtime
print(int(placed), int(time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)))') ||
    die "fedgen-edge in $environment is not whole; install it there again"
placed=${times% *} booted=${times#* }  # when the package was, and the machine; seconds since 1970

make_user() {
    if [ "$files_only" = yes ]; then return; fi
    if ! id "$user" >/dev/null 2>&1; then
        useradd --system --user-group --home-dir "@{state}" --shell /usr/sbin/nologin "$user" || die "cannot add the user $user"
    fi
    for group in video render; do  # GPUs of small devices
        if getent group "$group" >/dev/null; then usermod --append --groups "$group" "$user"; fi
    done
    say "ok: user $user"
}

folder() {  # folder MODE PATH
    if [ "$files_only" = yes ]; then install -d -m "$1" "$2"; else install -d -m "$1" -o "$user" -g "$user" "$2"; fi ||
        die "$2 cannot be made"
}

place() {  # place MODE FILE PATH: whole or not at all, so that a full disk does not take what was there
    [ -f "$here/$2" ] || die "$here/$2 is missing: the archive is not complete"
    if [ "$files_only" = yes ]; then install -m "$1" "$here/$2" "$3.new"; else install -m "$1" -o "$user" -g "$user" "$here/$2" "$3.new"; fi ||
        { rm -f "$3.new"; die "$3 cannot be written"; }
    cmp -s "$here/$2" "$3.new" || { rm -f "$3.new"; die "$3 is not what was written; is the disk full?"; }
    cmp -s "$3.new" "$3" || changed=yes
    mv -f "$3.new" "$3" || die "$3 cannot be written"
}

units=/etc/systemd/system

place_unit() {  # place_unit NAME
    cmp -s "$here/$1.service" "$units/$1.service" || changed=yes
    install -m 0644 "$here/$1.service" "$units/$1.service" || die "the service $1 cannot be installed"
    systemctl daemon-reload || die "systemctl daemon-reload failed"
    systemctl enable "$1.service" || die "the service $1 cannot be enabled"
}

current() {  # current NAME: runs with what is installed: it was started after that
    systemctl is-active --quiet "$1.service" || return 1
    entered=$(systemctl show --property=ActiveEnterTimestampMonotonic --value "$1.service")  # less what it was suspended
    [ $((booted + entered / 1000000)) -ge "$placed" ]
}

serve() {  # serve NAME [TEXT]: runs, and where a TEXT is named has said it, which takes up to a minute
    if [ "$changed" = no ] && current "$1"; then
        say "ok: service $1 runs as before"
        return
    fi
    began=$(date +%s)
    systemctl restart "$1.service" || die "the service $1 does not start: journalctl -u $1"
    seconds=0 until=5
    if [ -n "${2:-}" ]; then until=60; fi
    while [ "$seconds" -lt "$until" ]; do
        sleep 1
        seconds=$((seconds + 1))
        systemctl is-active --quiet "$1.service" || die "the service $1 ended${3:-}: journalctl -u $1"
        if [ -n "${2:-}" ] && journalctl --quiet --output cat --unit "$1.service" --since "@$began" | grep -q "$2"; then
            say "ok: service $1 runs, and has reached the server"
            return
        fi
    done
    if [ -n "${2:-}" ]; then say "service $1 runs, but has not reached the server within a minute; it goes on trying"; else say "ok: service $1 runs"; fi
}
