#!/usr/bin/env bash
# Prepare a bare Debian or Ubuntu machine: system packages, a Python, the virtual environment.
#
#   bootstrap.sh run    what `make run` needs
#   bootstrap.sh dev    that, and what `make test` needs
#   bootstrap.sh vm     that, and what `make test-vm` needs
#   bootstrap.sh other  after dev: the same in .venv-other, for the other Python that is usable
#
# Does nothing, quickly, when everything is there. Asks for sudo only to install packages.
set -euo pipefail
# What apt says is read below, and not every language says it in the same words.
export LC_ALL=C.UTF-8
# A root shell that `su` opened has the PATH of the person before it.
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
# The web process, another user, must be able to read what is installed here.
umask 022

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
venv=$repo/.venv
profile=${1:-run}
# The Pythons that are usable, the preferred one first.
versions="3.12 3.13"
# Seconds that others' work with apt, or on this clone, is waited for.
longest_wait=3600
still_seconds=30

# One line per need; `a|b` is satisfied by either and installs the first that apt knows.
# shellcheck disable=SC2034
run_packages="
ca-certificates git gcc libc6-dev pkg-config lxc lxc-dev uidmap catatonit
mmdebstrap squid-openssl nftables apparmor iproute2 e2fsprogs util-linux procps tar xz-utils zstd
postgresql python3
"
dev_packages="chromium|chromium-browser curl strace"
vm_packages="qemu-system-x86 openssh-client"

say() { printf '  %s\n' "$*"; }
fail() { printf '\n  orkestr: %s\n' "$*" >&2; exit 1; }

# What is said of a command whose own output goes elsewhere.
exec 3>&1
# Say now and then that something goes on which says nothing itself; ends with this program.
still() {
    local began=$SECONDS
    [ -z "${lock_fd:-}" ] || exec {lock_fd}<&-
    while sleep "$still_seconds" 3>&- >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        say "$1: still at it after $((SECONDS - began)) s" >&3
    done
}
# with_word_of WHAT COMMAND…: run it, and say that it goes on.
with_word_of() {
    local status=0 told
    still "$1" &
    told=$!
    "${@:2}" 3>&- || status=$?
    kill "$told" 2>/dev/null || true
    wait "$told" 2>/dev/null || true
    return "$status"
}

# sudo takes these from the environment, and apt-get needs them where there is a proxy.
proxies() {
    local name
    for name in {http,https,ftp,no,all}_proxy {HTTP,HTTPS,FTP,NO,ALL}_PROXY; do
        [ -z "${!name:-}" ] || printf '%s=%s\n' "$name" "${!name}"
    done
}

as_root() {
    local kept
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        mapfile -t kept < <(proxies)
        if [ "${#kept[@]}" = 0 ]; then sudo "$@"; else sudo env "${kept[@]}" "$@"; fi
    else
        fail "this needs root to run: $* — start again as root, or install sudo"
    fi
}

check_machine() {
    case $profile in run | dev | other | vm) ;; *) fail "unknown profile '$profile': run, dev, other or vm" ;; esac
    [ "$(uname -s)" = Linux ] || fail "Orkestr Console runs on Linux (this is $(uname -s))"
    command -v apt-get >/dev/null || fail "this machine has no apt-get: Debian 12 or 13 \
is what the installer knows. Elsewhere install: $run_packages"
}

# --- system packages ---------------------------------------------------------------------------

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

missing_from() {
    local need option
    for need in "$@"; do
        for option in ${need//|/ }; do installed "$option" && continue 2; done
        printf '%s\n' "$need"
    done
}

installable() {
    local option
    for option in ${1//|/ }; do
        if [ -n "$(apt-cache policy "$option" 2>/dev/null | sed -n 's/^  Candidate: //p' | grep -v none)" ]; then
            printf '%s\n' "$option"
            return
        fi
    done
    # In a subshell of the caller's, which fails with it.
    fail_at_apt "apt knows no package called ${1//|/ or } (do its sources have it?)"
}

# Debian makes and starts a main PostgreSQL cluster, and starts squid and lxc-net, as they are
# installed. None of that is wanted: this project runs its own, privately.
policy=/usr/sbin/policy-rc.d
policy_text='#!/bin/sh
# Of orkestr_console/runner/bootstrap.sh, while it installs packages.
exit 101'
release_daemons() { as_root rm -f "$policy"; }
hold_daemons() {
    as_root install -d -m 755 /etc/postgresql-common/createcluster.d
    if ! installed postgresql && [ ! -e /etc/postgresql-common/createcluster.d/orkestr.conf ]; then
        printf 'create_main_cluster = false\n' |
            as_root tee /etc/postgresql-common/createcluster.d/orkestr.conf >/dev/null
    fi
    # Ours from a run that was killed would keep every daemon off for ever.
    if [ ! -e "$policy" ] || [ "$(cat "$policy")" = "$policy_text" ]; then
        printf '%s\n' "$policy_text" | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
        trap release_daemons EXIT
    fi
}

keep_off_at_boot() {
    command -v systemctl >/dev/null || return 0
    local package
    for package in "$@"; do
        case $package in
            squid*) as_root systemctl disable squid.service >/dev/null 2>&1 || true ;;
            lxc) as_root systemctl disable lxc-net lxc lxc-monitord >/dev/null 2>&1 || true ;;
        esac
    done
}

# What keeps apt from fetching, if that is what it said: an update that fetched nothing is none of
# its errors.
not_fetched=''
note_fetching() {
    local line
    line=$(sed -n 's/^[EW]: Failed to fetch \([^ ]*\) */\1: /p' "$1" | head -n1)
    [ -z "$line" ] || not_fetched=$line
}

# apt-get, once no other one works: a machine that has just booted updates itself, for one. What it
# said is shown only if it fails, and not if one line of it says why.
apt_get() {
    local said told='' began=$SECONDS
    said=$(mktemp)
    until with_word_of "system packages" as_root env DEBIAN_FRONTEND=noninteractive NEEDRESTART_MODE=l \
        apt-get -q "$@" >"$said" 2>&1 </dev/null; do
        note_fetching "$said"
        if ! grep -q '^E: Could not get lock' "$said" || [ $((SECONDS - began)) -ge "$longest_wait" ]; then
            [ -n "$not_fetched" ] || tail -n 30 "$said" >&2
            rm -f "$said"
            return 1
        fi
        [ -n "$told" ] ||
            say "system packages: waiting for $(sed -n 's/^E: .* held by //p' "$said" | head -n1), which uses apt"
        told=yes
        sleep 2
    done
    note_fetching "$said"
    rm -f "$said"
}

# fail_at_apt WHAT: why apt could not do something, and what to do about it.
fail_at_apt() {
    [ -n "$not_fetched" ] || fail "$1"
    fail "$1: it could not fetch $not_fetched. Check this machine's network, DNS and apt sources, and \
start again: what was fetched is kept."
}

# Once a run: a machine may know nothing of its mirrors' packages yet, or only old ones.
update_lists() {
    [ -z "${lists_updated:-}" ] || return 0
    apt_get update || fail_at_apt "apt-get update failed"
    lists_updated=yes
}

install_packages() {
    local missing need option packages=()
    missing=$(missing_from "$@")
    [ -n "$missing" ] || return 0
    say "system packages: installing" $missing
    hold_daemons
    update_lists
    for need in $missing; do
        option=$(installable "$need") || exit 1
        packages+=("$option")
    done
    apt_get -y --no-install-recommends -o Dpkg::Use-Pty=0 install "${packages[@]}" ||
        fail_at_apt "apt-get could not install ${packages[*]}"
    keep_off_at_boot "${packages[@]}"
}

# --- python ------------------------------------------------------------------------------------

# Usable: of a wanted version, with venv, and with the headers that building the lxc binding needs.
usable_python() {
    # shellcheck disable=SC2086
    "$1" - $versions 2>/dev/null <<'PY'
import ensurepip, pathlib, sys, sysconfig, venv
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
if not ("%d.%d" % sys.version_info[:2] in sys.argv[1:] and header.exists()):
    sys.exit(1)
print(sys.executable)
PY
}

find_python() {
    local candidate
    for candidate in "${ORKESTR_PYTHON:-}" \
        "${PYENV_ROOT:-${HOME:-/root}/.pyenv}"/versions/3.1[23]*/bin/python3 \
        python3.12 python3.13 python3 \
        "${HOME:-/root}"/.local/share/uv/python/cpython-3.1[23]*/bin/python3; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null && usable_python "$candidate" && return
    done
    return 1
}

install_python() {
    local version wanted=${versions%% *}
    update_lists
    for version in $versions; do
        if apt-cache show "python$version-venv" >/dev/null 2>&1; then
            install_packages "python$version" "python$version-venv" "python$version-dev"
            return
        fi
    done
    say "python: this Debian has no ${versions// / or }; uv fetches $wanted from where its builds are released"
    local tools uv=$repo/.venv/bin/uv
    tools=$(mktemp -d)
    if ! [ -x "$uv" ]; then
        install_packages python3 python3-venv
        python3 -m venv "$tools"
        locked uv >"$tools/uv.txt"
        "$tools/bin/pip" -qq install --require-hashes -r "$tools/uv.txt"
        uv=$tools/bin/uv
    fi
    "$uv" python install "$wanted" || fail "uv could not fetch a Python. Install Python \
${versions// / or } with its headers yourself and start again with ORKESTR_PYTHON=/path/to/python$wanted"
    rm -rf "$tools"
}

ensure_python() {
    python=$(find_python) && return
    install_python
    python=$(find_python) || fail "no usable Python ${versions// / or } (with venv and Python.h) was \
found. Install one and start again with ORKESTR_PYTHON=/path/to/python${versions%% *}"
}

# From here on only what .venv is not counts as usable, and has an environment of its own.
choose_other_python() {
    local first
    first=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        fail "there is no .venv yet: run bootstrap.sh dev first"
    versions=$(tr ' ' '\n' <<<"$versions" | grep -vxF "$first")
    venv=$repo/.venv-other
}

other_python_can_be_had() {
    usable_python "$venv/bin/python" >/dev/null || (ensure_python) && return
    rm -rf "$venv"
    say "python $versions: cannot be had here (above), so NOTHING IS TESTED ON IT"
    return 1
}

# --- the virtual environment -------------------------------------------------------------------

# The lock's entry for one package: its pinned version and hashes.
locked() { sed -n "/^$1==/,/[^\\\\]\$/p" "$repo/requirements.txt"; }

stamp_of() { sha256sum "$1" | cut -d' ' -f1; }

up_to_date() {
    [ -x "$venv/bin/python" ] && [ -f "$venv/.orkestr-$profile" ] &&
        [ "$(cat "$venv/.orkestr-$profile")" = "$(stamp_of "$lock")" ] &&
        usable_python "$venv/bin/python" >/dev/null
}

# uv does not read pip's configuration; a mirror that the machine gives pip is given to uv here.
# (An address given by hand, UV_DEFAULT_INDEX and the like, stays in force.)
pip_setting() {
    printf '%s\n' "$pip_config" | sed -n "s/^\(:env:\|global\|install\)\.$1='\(.*\)'\$/\2/p" | head -n1
}
lend_pip_settings_to_uv() {
    local pip_config value
    pip_config=$("$venv/bin/python" -m pip config list 2>/dev/null || true)
    value=$(pip_setting index-url) && [ -n "$value" ] && export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$value}"
    value=$(pip_setting extra-index-url) && [ -n "$value" ] && export UV_INDEX="${UV_INDEX:-$value}"
    value=$(pip_setting find-links) && [ -n "$value" ] && export UV_FIND_LINKS="${UV_FIND_LINKS:-${value// /,}}"
    value=$(pip_setting cert) && [ -n "$value" ] && export SSL_CERT_FILE="${SSL_CERT_FILE:-$value}"
    return 0
}

# pip and uv say much, and little of it to the point: it is kept, and shown when nothing else is known.
install_locked() {
    local wanted
    wanted=$(mktemp)
    locked uv >"$wanted"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$venv/bin/python" -m ensurepip >/dev/null
    pip_install -r "$wanted" || return 1
    rm -f "$wanted"
    lend_pip_settings_to_uv
    # Every file is checked against its locked hash, so it does not matter which index it is from.
    "$venv/bin/uv" --quiet pip install --python "$venv/bin/python" --require-hashes --compile-bytecode \
        --index-strategy unsafe-best-match -r "$lock" && return
    [ -z "$(index_trouble)" ] || return 1
    echo "uv could not install the lock; trying pip"
    pip_install -r "$lock"
}
pip_install() {
    "$venv/bin/python" -m pip -q --disable-pip-version-check install --retries 2 --require-hashes "$@"
}

# What is wrong with the package index, as a clause; nothing when it answers.
index_trouble() {
    "$venv/bin/python" "$repo/orkestr_console/runner/package_index.py" 2>/dev/null || true
}

ensure_packages() {
    local log=$venv/install.log trouble
    trouble=$(index_trouble)
    [ -z "$trouble" ] || say "python packages: $trouble; trying all the same"
    with_word_of "python packages" install_locked >"$log" 2>&1 && return
    trouble=$(index_trouble)
    [ -z "$trouble" ] || fail "the Python packages could not be fetched: $trouble. Check this machine's \
network and DNS, or give pip another index (pip config set global.index-url …), and start again. All \
that was said is in $log."
    tail -n 15 "$log" >&2
    fail "the locked Python packages could not be installed (above; all that was said is in $log)"
}

ensure_venv() {
    lock=$repo/requirements.txt
    [ "$profile" = run ] || lock=$repo/requirements-dev.txt
    up_to_date && return
    [ ! -e "$venv" ] || [ -w "$venv/bin" ] ||
        fail "$venv belongs to $(stat -c %U "$venv"): start again as that user, or remove it"
    if ! { [ -x "$venv/bin/python" ] && usable_python "$venv/bin/python" >/dev/null; }; then
        ensure_python
        say "python: $("$python" --version | cut -d' ' -f2) at $python"
        rm -rf "$venv"
        "$python" -m venv "$venv" || fail "could not make a virtual environment with $python"
    fi
    say "python packages: installing the locked set ($(basename "$lock"))"
    ensure_packages
    [ "$profile" = dev ] && stamp_of "$repo/requirements.txt" >"$venv/.orkestr-run"
    stamp_of "$lock" >"$venv/.orkestr-$profile"
}

# Two at once in one clone would each remove what the other installs. The lock is this program's own
# for as long as it lives, and what it starts must not keep it (flock(2)).
one_at_a_time() {
    exec {lock_fd}<"$repo/orkestr_console/runner/bootstrap.sh"
    flock --nonblock "$lock_fd" && return
    say "waiting for another start of this clone, which installs what is missing"
    flock --timeout "$longest_wait" "$lock_fd" ||
        fail "another start of this clone has been installing for an hour: end it and start again"
}

# For its tests, which source it.
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0

check_machine
one_at_a_time
case $profile in
    run) install_packages $run_packages ;;
    dev | other) install_packages $run_packages $dev_packages ;;
    vm) install_packages $run_packages $vm_packages && profile=dev ;;  # the same virtual environment
esac
if [ "$profile" = other ]; then
    choose_other_python
    # A second opinion: where it cannot be had, the tests on the first one still count.
    other_python_can_be_had || exit 0
fi
ensure_venv
# The web process runs as a user who may not write here: compile for it beforehand.
"$venv/bin/python" -m compileall -q "$repo"/{hostruntime,orkestr_console,templates_app,sandboxes_app} || true
