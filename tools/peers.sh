#!/usr/bin/env bash
# Get what only some tests use: Triton's Python client and perf_analyzer, in an environment of their own below .cache/peers.
# Where they can't be had, it says so and goes on: those tests then skip with a reason.
# Argument: the Python that makes the environment.
set -u
cd "$(dirname "$0")/.." || exit 1
log=$(mktemp)
if ! timeout 300 "$1" -m benchmarks.peers install tritonclient >"$log" 2>&1; then
  echo "make: not here: tritonclient and perf_analyzer ($(tail -1 "$log")); the tests that use them will skip"
fi
rm -f "$log"
exit 0
