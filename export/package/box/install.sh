#!/bin/sh
# Installs this package on a box: checks it, builds the engine, holds it to what PyTorch gave, and only then switches over.
#
#   sudo ./install.sh [--check | --rollback] [--engine tensorrt|portable] [--keep N] [--force] [--root DIR]
#
# --check      only check the package and the box
# --rollback   go back to the version that was there before
# --engine     portable runs the graph itself on the CPU, where no engine can be built
# --keep       versions to keep, the current one among them (2)
# --force      go on although the box is not as expected
# --root       install under this folder and start no service; for images and tests
#
# It may be killed at any point and run again: what was finished is kept, and the version in use stays until the new one is
# proven. Exit status: 0 done, 1 the engine does not match or its service does not start, 2 bad usage or a damaged package,
# 3 the box lacks what it takes.
set -eu
umask 022

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
root='' action=install engine=tensorrt keep=2 force=''
python=${GALERNE_PYTHON:-/usr/bin/python3}

say() { printf 'install.sh: %s\n' "$*" >&2; }
fail() {
    status=$1
    shift
    say "$*"
    exit "$status"
}
# What may be overruled.
refuse() {
    [ -n "$force" ] || fail 3 "$* (--force goes on all the same)"
    say "warning: $*"
}
usage() { fail 2 "$*; usage: install.sh [--check | --rollback] [--engine tensorrt|portable] [--keep N] [--force] [--root DIR]"; }

while [ $# -gt 0 ]; do
    case $1 in
        --check) action=check ;;
        --rollback) action=rollback ;;
        --force) force=yes ;;
        --engine | --keep | --root)
            [ $# -gt 1 ] || usage "$1: expected a value"
            case $1 in
                --engine) engine=$2 ;;
                --keep) keep=$2 ;;
                --root) root=${2%/} ;;
            esac
            shift
            ;;
        *) usage "unknown option $1" ;;
    esac
    shift
done
case $engine in tensorrt | portable) ;; *) usage "--engine: expected tensorrt or portable, found $engine" ;; esac
case $keep in '' | *[!0-9]* | 0*) usage "--keep: expected 1 or more, found $keep" ;; esac

conf() { sed -n "s/^$1=//p" "$here/box.conf"; }
if ! [ -f "$here/box.conf" ] || ! [ -f "$here/SHA256SUMS" ]; then
    fail 2 "$here: no package; unpack it again"
fi
[ "$(conf format)" = 1 ] || fail 2 "$here/box.conf: format: expected 1, found $(conf format); make the package with this version of Galerne"
name=$(conf name)
base=$root/opt/galerne/$name
unit=galerne-$name.service
if [ -z "$root" ]; then
    systemctl=${GALERNE_SYSTEMCTL-systemctl}
else
    systemctl=${GALERNE_SYSTEMCTL-}
fi
# The engine is part of what is installed, so it is part of the version's name.
release=$(sha256sum "$here/SHA256SUMS" | cut -c1-16)-$engine

in_use() { if [ -L "$base/$1" ]; then basename "$(readlink "$base/$1")"; fi; }

# A link is made beside its place and renamed, so that there is one at any time.
point() {
    ln -sfn "releases/$2" "$base/.$1.new"
    mv -T "$base/.$1.new" "$base/$1"
}

start_service() {
    [ -n "$systemctl" ] || return 0
    "$systemctl" daemon-reload && "$systemctl" enable --quiet "$unit" && "$systemctl" restart "$unit"
}

version_of() { dpkg-query -W -f '${Version}' "$1" 2>/dev/null || true; }

check_package() {
    (cd "$here" && sha256sum --check --quiet --strict SHA256SUMS) >&2 || fail 2 "$here: a file differs from SHA256SUMS; copy the package again"
    [ "$(conf parity)" = passed ] || say "warning: packed with --force, the bundle's parity verdict: $(conf parity)"
}

check_jetpack() {
    file=$root/etc/nv_tegra_release
    [ -f "$file" ] || fail 3 "$file: no such file, so this is no Jetson with JetPack; the package is for $(conf target)"
    wanted=$(conf jetpack)
    found=$(version_of nvidia-jetpack)
    case $found in
        '') say "JetPack: nvidia-jetpack is not installed, so TensorRT's version decides" ;;
        "$wanted" | "$wanted"[!0-9]*) say "JetPack $found" ;;
        "${wanted%%.*}".*) say "warning: JetPack: expected $wanted, found $found; TensorRT's version decides" ;;
        *) refuse "JetPack: expected $wanted, found $found; make the package for that one with --stack" ;;
    esac
    wanted=$(conf tensorrt)
    found=$(version_of tensorrt)
    [ -n "$found" ] || found=$(version_of python3-libnvinfer)
    [ -n "$found" ] || fail 3 "TensorRT: expected $wanted, found none; sudo apt-get install nvidia-jetpack"
    case $found in
        "$wanted" | "$wanted"[!0-9]*) ;;
        *) refuse "TensorRT: expected $wanted, found $found; make the package for that one with --stack" ;;
    esac
    found=$("$python" -s -c 'import tensorrt; print(tensorrt.__version__)' 2>/dev/null) ||
        fail 3 "TensorRT: its Python module cannot be imported; sudo apt-get install python3-libnvinfer"
    say "TensorRT $found"
}

check_power() {
    command -v nvpmodel >/dev/null || return 0
    wanted=$(conf power_mode)
    found=$(nvpmodel -q 2>/dev/null | tail -n 1)
    [ -z "$wanted" ] || [ "$found" = "$wanted" ] || say "warning: power mode: expected $wanted ($(conf power_mode_name)), found" \
        "${found:-none}; TensorRT chooses by what it measures now: sudo nvpmodel -m $wanted"
}

check_box() {
    [ -n "$root" ] || [ "$(id -u)" = 0 ] || fail 3 "run it as root: sudo $here/install.sh"
    found=$(uname -m)
    [ "$found" = aarch64 ] || fail 3 "processor: expected aarch64, found $found"
    wanted=$(conf python)
    found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail 3 "$python: does not run; set GALERNE_PYTHON"
    [ "$found" = "$wanted" ] || fail 3 "Python: expected $wanted, found $found at $python; the wheels are for $wanted only"
    need=run_memory_bytes
    if [ "$engine" = tensorrt ]; then
        check_jetpack
        check_power
        need=build_memory_bytes
    fi
    found=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' "$root/proc/meminfo") / 1024))
    wanted=$(($(conf $need) / 1048576))
    [ "$found" -ge "$wanted" ] || refuse "memory: expected $wanted MiB available, found $found; stop what uses it"
    place=$root/
    [ ! -d "$base" ] || place=$base
    found=$(($(df -Pk "$place" | awk 'NR == 2 { print $4 }') / 1024))
    wanted=$(($(conf disk_bytes) / 1048576))
    [ -d "$base/releases/$release" ] || [ -d "$work" ] || [ "$found" -ge "$wanted" ] ||
        refuse "disk: expected $wanted MiB free at $place, found $found; free some"
}

# The parts of a version, each done once: a mark says that it was finished.
finished() { [ -e "$work/.finished-$1" ]; }
finish() {
    sync "$work"
    touch "$work/.finished-$1"
}

copy_files() {
    finished files && return
    rm -rf "$work"
    mkdir -p "$work/site"
    for part in bundle bin parity plan "$unit" box.conf; do
        cp -R "$here/$part" "$work/" || fail 3 "$work: cannot copy $part there; free some space and run it again"
    done
    finish files
}

unpack_wheels() {
    finished site && return
    rm -rf "$work/site"
    for wheel in "$here"/wheels/*.whl; do
        "$python" -m zipfile -e "$wheel" "$work/site" || fail 3 "$work/site: cannot unpack $wheel there; free some space and run it again"
    done
    finish site
}

galerne() { PYTHONDONTWRITEBYTECODE=1 "$python" -s "$work/bin/galerne" "$@"; }

build_engine() {
    finished engine && return
    galerne compile "$work/bundle" --plan "$work/plan" >/dev/null || {
        status=$?
        [ "$status" -lt 4 ] || status=3
        fail "$status" "the engine cannot be built here; ${current:-nothing} is still in use"
    }
    finish engine
}

verify_engine() {
    finished parity && return
    galerne verify "$work/bundle" --recorded "$work/parity/recorded.safetensors" --engine "$engine_name" >&2 || {
        status=$?
        rm -rf "$work" # what was built is not to be trusted; the next run builds anew
        [ "$status" -eq 1 ] || fail 3 "the engine does not run here; ${current:-nothing} is still in use"
        fail 1 "the engine does not match its source; ${current:-nothing} is still in use"
    }
    finish parity
}

write_environment() {
    installed=/opt/galerne/$name/current
    cat >"$work/galerne.env" <<END
GALERNE_BUNDLE=$installed/bundle
GALERNE_ENGINE=$engine_name
GALERNE_RECORDED=$installed/parity/recorded.safetensors
PYTHONPATH=$installed/site
END
}

install_unit() {
    units=$root/etc/systemd/system
    mkdir -p "$units"
    cmp -s "$base/current/$unit" "$units/$unit" || {
        cp "$base/current/$unit" "$units/.$unit.new"
        mv "$units/.$unit.new" "$units/$unit"
    }
}

# The newest are kept; a version that was not finished goes.
remove_old() {
    kept=1
    # This script made the names.
    # shellcheck disable=SC2045
    for found in $(ls -t "$base/releases"); do
        [ "$found" != "$release" ] || continue
        kept=$((kept + 1))
        [ "$kept" -le "$keep" ] || rm -rf "${base:?}/releases/$found"
    done
    [ -d "$base/previous/" ] || rm -f "$base/previous"
    for found in "$base/releases"/.*.partial; do
        [ ! -d "$found" ] || rm -rf "$found"
    done
}

# Switch, start, and go back where it does not start.
switch_to() {
    before=$(in_use current)
    if [ "$before" != "$1" ]; then
        [ -z "$before" ] || point previous "$before"
        point current "$1"
    fi
    install_unit
    if ! start_service; then
        [ "$before" != "$1" ] || before=$(in_use previous)
        if [ -n "$before" ]; then
            point current "$before"
            install_unit
            start_service || say "warning: $unit does not start with $before either"
        else
            rm -f "$base/current"
        fi
        fail 1 "$unit does not start with $1; ${before:-nothing} is in use again; see journalctl -u $unit"
    fi
}

engine_name=portable
[ "$engine" = portable ] || engine_name=$(conf target)
work=$base/releases/.$release.partial

if [ "$action" = check ]; then
    check_package
    check_box
    say "the box is ready for $name"
    exit 0
fi

mkdir -p "$base/releases" || fail 3 "$base: cannot be made; run it as root"
exec 9>>"$base/.lock"
flock -n 9 || fail 3 "$base: another install is running; wait for it"

if [ "$action" = rollback ]; then
    before=$(in_use previous)
    [ -d "$base/previous/" ] || fail 3 "$base: there is no version to go back to"
    switch_to "$before"
    say "$before is in use"
    exit 0
fi

check_package
current=$(in_use current)
if [ "$current" = "$release" ] && [ -e "$base/releases/$release/.complete" ]; then
    say "$release is in use already; nothing to do"
    exit 0
fi
check_box
if [ ! -d "$base/releases/$release" ]; then
    copy_files
    unpack_wheels
    if [ "$engine" = tensorrt ]; then
        build_engine
    fi
    verify_engine
    write_environment
    sync
    mv -T "$work" "$base/releases/$release"
fi
switch_to "$release"
touch "$base/releases/$release/.complete"
remove_old
say "$release is in use: $base/current"
