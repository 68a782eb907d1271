#!/usr/bin/env bash
# Get what only some tests use: Prometheus and promtool (the tests start one of their own; no other is touched).
# Installs them where that is possible: Debian-like, root. Otherwise says so and goes on: those tests then skip with a reason.
# The package's own service stays off, unless it was there before.
set -u
command -v prometheus >/dev/null 2>&1 && command -v promtool >/dev/null 2>&1 && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "make: not here: prometheus; the tests that use it will skip (Debian, as root: apt-get install prometheus)"
  exit 0
fi
echo "make: installing prometheus for the tests that use it"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then # without it the package starts a server for the whole machine
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && made=$policy
fi
if ! { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends prometheus; } >"$log" 2>&1; then
  echo "make: could not install prometheus ($(tail -1 "$log")); the tests that use it will skip"
fi
[ -z "$made" ] || rm -f "$made"
rm -f "$log"
exit 0
