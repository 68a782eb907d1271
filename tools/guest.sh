#!/usr/bin/env bash
# Get what the guest tests use: QEMU, and Debian's cloud kernel below CACHE (default .cache/guest), unpacked, not installed.
# Where that is not possible it says so and goes on: those tests then skip with a reason. Quick when all is there.
#   tools/guest.sh [CACHE]
set -u
cache=${1:-$(cd "$(dirname "$0")/.." && pwd)/.cache/guest}
mkdir -p "$cache"
give_up() { echo "make: $1; the tests in a guest will skip"; exit 0; }
have_qemu() { command -v qemu-system-x86_64 >/dev/null 2>&1; }
have_kernel() { [ -s "$cache/vmlinuz" ]; }

if have_qemu && have_kernel; then exit 0; fi
[ "$(uname -m)" = x86_64 ] || give_up "no x86_64 machine"
command -v apt-get >/dev/null 2>&1 || give_up "no Debian-like system: QEMU or $cache/vmlinuz is missing"
if ! have_qemu && [ "$(id -u)" -ne 0 ]; then give_up "QEMU is missing (as root: apt-get install qemu-system-x86)"; fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
export DEBIAN_FRONTEND=noninteractive
kernel_package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1; }
if [ "$(id -u)" -eq 0 ] && { ! have_qemu || [ -z "$(kernel_package)" ]; }; then
  timeout 120 apt-get update -qq >"$work/log" 2>&1 || give_up "apt-get update failed ($(tail -1 "$work/log"))"
fi
if ! have_qemu; then
  echo "make: installing qemu-system-x86 for the tests in a guest"
  timeout 300 apt-get install -y -qq --no-install-recommends qemu-system-x86 >"$work/log" 2>&1 ||
    give_up "qemu-system-x86 could not be installed ($(tail -1 "$work/log"))"
fi
if ! have_kernel; then
  package=$(kernel_package)
  [ -n "$package" ] || give_up "this system's package lists have no linux-image-cloud-amd64"
  echo "make: fetching $package for the tests in a guest"
  (cd "$work" && timeout 300 apt-get download -qq "$package" && dpkg-deb -x ./"$package"_*.deb root) >"$work/log" 2>&1 ||
    give_up "$package could not be fetched ($(tail -1 "$work/log"))"
  echo "${package#linux-image-}" >"$cache/kernel"
  cp "$work"/root/boot/vmlinuz-* "$cache/vmlinuz.part" && chmod 644 "$cache/vmlinuz.part" && mv "$cache/vmlinuz.part" "$cache/vmlinuz"
fi
