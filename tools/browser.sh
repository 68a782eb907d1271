#!/usr/bin/env bash
# Get what only some tests use: a Chromium (looks at the report) and iproute2 (network namespaces).
# Installs them where that is possible: Debian-like, root. Otherwise says so and goes on: those tests then skip with a reason.
set -u
missing=()
command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || missing+=(chromium)
command -v ip >/dev/null 2>&1 || [ -x /usr/sbin/ip ] || missing+=(iproute2)
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "make: not here: ${missing[*]}; the tests that use them will skip (Debian, as root: apt-get install ${missing[*]})"
  exit 0
fi
echo "make: installing ${missing[*]} for the tests that use them"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
if ! { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
  echo "make: could not install ${missing[*]} ($(tail -1 "$log")); the tests that use them will skip"
fi
rm -f "$log"
exit 0
