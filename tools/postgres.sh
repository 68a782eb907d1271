#!/usr/bin/env bash
# Get what only some tests use: the programs of a PostgreSQL server (they start one of their own; no other is touched).
# Installs them where that is possible: Debian-like, root. Otherwise says so and goes on: those tests then skip with a reason.
set -u
command -v initdb >/dev/null 2>&1 && exit 0
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null && exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "make: not here: postgresql; the tests that use it will skip (Debian, as root: apt-get install postgresql)"
  exit 0
fi
echo "make: installing postgresql for the tests that use it"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends postgresql; } >"$log" 2>&1; then
  echo "make: could not install postgresql ($(tail -1 "$log")); the tests that use it will skip"
fi
rm -f "$log"
exit 0
