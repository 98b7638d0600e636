#!/bin/bash
# Runs the tests of network hosts on a kernel that has netem, where this machine's has none: as root, with Debian's
# packages user-mode-linux and kmod, and the project's .venv. This script is also what that kernel starts first.
set -u
cd "$(dirname "$0")/../.." || exit 2
here=$PWD/build/netem

if [[ $$ -ne 1 ]]; then
    rm -rf "$here" && mkdir -p "$here/lib" "$here/tmp" && ln -s /usr/lib/uml/modules "$here/lib/modules" || exit 2
    timeout 900 linux.uml mem=4G root=/dev/root rootfstype=hostfs rootflags=/ rw con=null con0=null \
        init="$PWD/tests/e2e/netem.sh" </dev/null >"$here/console" 2>&1
    cat "$here/log"
    exit "$(cat "$here/code" || echo 2)"
fi

export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 TMPDIR=$here/tmp PYTHONDONTWRITEBYTECODE=1
exec >"$here/log" 2>&1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs "$here/tmp" # SQLite maps its files, which hostfs does not let it
ip link set lo up
for module in veth bridge sch_netem; do modprobe -d "$here" "$module"; done
.venv/bin/python -m pytest tests/e2e/test_namespaces.py -v -s -p no:cacheprovider --basetemp "$here/tmp/pytest"
echo $? >"$here/code"
sync
echo o >/proc/sysrq-trigger # off, which takes a moment
sleep infinity
