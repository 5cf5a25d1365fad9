#!/bin/sh
# Makes the folder that the qemu test runs in: Debian's arm64 Python 3.11 under qemu-user. Needs debootstrap and
# qemu-user-static, and the network once. `make arm64-root` calls it.
set -eu
root=$1
test -e "$root/.complete" && exit 0
rm -rf "$root" "$root.debs"
debootstrap --foreign --variant=minbase --arch=arm64 --include=python3 bookworm "$root.debs" >/dev/null
mkdir -p "$root/proc"
for deb in "$root.debs"/var/cache/apt/archives/*.deb; do
    dpkg -x "$deb" "$root"
done
rm -rf "$root.debs"
# ONNX Runtime reads the processor's kind here, and would find this machine's.
i=0
while [ $i -lt 2 ]; do
    cat <<EOF
processor	: $i
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x0
CPU part	: 0xd42
CPU revision	: 1

EOF
    i=$((i + 1))
done >"$root/proc/cpuinfo"
touch "$root/.complete"
