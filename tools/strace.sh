#!/usr/bin/env bash
# Get what only some tests use: strace, with which programs are watched when their closures are made.
# Installs it where that is possible: Debian-like, root. Otherwise says so and goes on: those tests then skip with a reason.
set -u
command -v strace >/dev/null 2>&1 && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "make: not here: strace; the tests that use it will skip (Debian, as root: apt-get install strace)"
  exit 0
fi
echo "make: installing strace for the tests that use it"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends strace; } >"$log" 2>&1; then
  echo "make: could not install strace ($(tail -1 "$log")); the tests that use it will skip"
fi
rm -f "$log"
exit 0
