    command -v nginx >/dev/null || die "nginx is missing, without which no device reaches the SuperLink: apt install nginx"
    [ -d /etc/nginx/conf.d ] || die "/etc/nginx/conf.d is not there; put $here/nginx.conf where nginx reads it"
    conf=/etc/nginx/conf.d/fedgen-@{name}.conf
    if [ -e "$conf.old" ]; then mv "$conf.old" "$conf"; fi  # of an installer that was interrupted
    if [ -e "$conf" ]; then mv "$conf" "$conf.old" || die "$conf cannot be moved"; fi
    # With one that is refused nginx would not start again, and with it whatever else it serves.
    refuse() { rm -f "$conf"; if [ -e "$conf.old" ]; then mv "$conf.old" "$conf"; fi; die "$1; $conf is as it was"; }
    # Without IPv6 in the kernel nginx would refuse all of it.
    if [ -e /proc/net/if_inet6 ]; then cat "$here/nginx.conf"; else sed '/listen \[::\]/d' "$here/nginx.conf"; fi >"$conf" ||
        refuse "nginx's configuration cannot be written"
    chmod 0644 "$conf" || refuse "$conf cannot be made readable"
    nginx -t || refuse "nginx refuses $here/nginx.conf, see above"
    rm -f "$conf.old"
    systemctl enable --now nginx || die "nginx does not start: journalctl -u nginx"
    systemctl reload nginx || die "nginx cannot be reloaded: journalctl -u nginx"
    say "ok: nginx passes the fleet API on port @{port}"
    "$python" -P -m fedgen_app.fleet.checks server "127.0.0.1:@{port}" "$target/ca.crt" || die "nginx does not answer as it should"
