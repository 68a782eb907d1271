#!/usr/bin/env bash
# Get what the tests in guests and of microVMs use: QEMU, mksquashfs, and Debian's cloud kernel with the modules of a microVM
# below CACHE (default .cache/guest), unpacked, not installed.
# Where that is not possible it says so and goes on: those tests then skip with a reason. Quick when all is there.
#   tools/guest.sh [CACHE]
set -u
cache=${1:-$(cd "$(dirname "$0")/.." && pwd)/.cache/guest}
mkdir -p "$cache"
give_up() { echo "make: $1; the tests in a guest will skip"; exit 0; }
have_qemu() { command -v qemu-system-x86_64 >/dev/null 2>&1; }
have_kernel() { [ -s "$cache/vmlinuz" ] && [ -d "$cache/lib/modules" ]; }
have_squashfs() { command -v mksquashfs >/dev/null 2>&1; }
modules="virtio_ring virtio virtio_mmio failover net_failover virtio_net virtio_blk squashfs"

if have_qemu && have_kernel && have_squashfs; then exit 0; fi
[ "$(uname -m)" = x86_64 ] || give_up "no x86_64 machine"
command -v apt-get >/dev/null 2>&1 || give_up "no Debian-like system: QEMU or $cache/vmlinuz is missing"
for program in "qemu-system-x86_64 qemu-system-x86" "mksquashfs squashfs-tools"; do
  set -- $program
  if ! command -v "$1" >/dev/null 2>&1 && [ "$(id -u)" -ne 0 ]; then give_up "$1 is missing (as root: apt-get install $2)"; fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
export DEBIAN_FRONTEND=noninteractive
kernel_package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1; }
if [ "$(id -u)" -eq 0 ] && { ! have_qemu || ! have_squashfs || [ -z "$(kernel_package)" ]; }; then
  timeout 120 apt-get update -qq >"$work/log" 2>&1 || give_up "apt-get update failed ($(tail -1 "$work/log"))"
fi
if ! have_qemu || ! have_squashfs; then
  echo "make: installing qemu-system-x86 and squashfs-tools for the tests in a guest"
  timeout 300 apt-get install -y -qq --no-install-recommends qemu-system-x86 squashfs-tools >"$work/log" 2>&1 ||
    give_up "qemu-system-x86 and squashfs-tools could not be installed ($(tail -1 "$work/log"))"
fi
if ! have_kernel; then
  package=$(kernel_package)
  [ -n "$package" ] || give_up "this system's package lists have no linux-image-cloud-amd64"
  echo "make: fetching $package for the tests in a guest"
  (cd "$work" && timeout 300 apt-get download -qq "$package" && dpkg-deb -x ./"$package"_*.deb root) >"$work/log" 2>&1 ||
    give_up "$package could not be fetched ($(tail -1 "$work/log"))"
  release=${package#linux-image-}
  mkdir -p "$work/kept/modules/$release/kernel"
  for module in $modules; do
    find "$work/root" -path "*/$release/kernel/*" -name "$module.ko*" -exec cp {} "$work/kept/modules/$release/kernel/" \;
  done
  find "$work/root" -path "*/$release/modules.builtin" -exec cp {} "$work/kept/modules/$release/" \;
  rm -rf "$cache/lib" && mkdir -p "$cache" && cp -r "$work/kept" "$cache/lib"
  echo "$release" >"$cache/kernel"
  cp "$work"/root/boot/vmlinuz-* "$cache/vmlinuz.part" && chmod 644 "$cache/vmlinuz.part" && mv "$cache/vmlinuz.part" "$cache/vmlinuz"
fi
