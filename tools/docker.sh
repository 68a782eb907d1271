#!/usr/bin/env bash
# Get what only some tests use: the programs of a Docker Engine (they start one of their own; no other is touched).
# Installs them where that is possible: Debian-like, root. Otherwise says so and goes on: those tests then skip with a reason.
# No engine is started here: services of the package stay off, and the tests' own ends with them (tests/docker_engine.py).
set -u
missing=()
command -v dockerd >/dev/null 2>&1 || [ -x /usr/sbin/dockerd ] || missing+=(docker.io)
command -v iptables >/dev/null 2>&1 || [ -x /usr/sbin/iptables ] || missing+=(iptables)
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "make: not here: ${missing[*]}; the tests that use them will skip (Debian, as root: apt-get install ${missing[*]})"
  exit 0
fi
echo "make: installing ${missing[*]} for the tests that use them"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then # without it the package starts an engine for the whole machine
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy" && made=$policy
fi
if ! { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  echo "make: could not install ${missing[*]} ($(tail -1 "$log")); the tests that use them will skip"
fi
[ -z "$made" ] || rm -f "$made"
rm -f "$log"
exit 0
