#!/bin/sh
# launcher.sh FILE MODULE: writes FILE, a command that runs MODULE's main with this checkout's .venv.
#
# The launcher finds the checkout through its own real path, so symlinks to it, spaces and a moved checkout do not matter.
# -I: mount(8) may run it in any directory and with any user's environment; neither may choose what Python imports. The
# checkout itself is on .venv's path (scripts/deps.sh).
set -eu
partial=$1.new.$$
cat >"$partial" <<LAUNCHER
#!/bin/sh
# Written by make; runs $2 with the checkout's own Python.
PATH=\${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
export PATH
self=\$(readlink -f -- "\$0")
root=\${self%/*/*}
if [ ! -x "\$root/.venv/bin/python" ]; then
    echo "\${0##*/}: \$root/.venv is not there: run make in \$root" >&2
    exit 2
fi
exec "\$root/.venv/bin/python" -I -m $2 "\$@"
LAUNCHER
chmod 755 "$partial"
if cmp -s "$partial" "$1" && [ -x "$1" ]; then rm -f "$partial"; else mv -f "$partial" "$1"; fi
