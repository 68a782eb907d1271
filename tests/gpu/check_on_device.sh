#!/usr/bin/env bash
# What only a real NVIDIA GPU can show, in under two minutes; prints one line a check and a last line of JSON.
#
#   bash tests/gpu/check_on_device.sh [RESULTS.json] [--only CHECK...]
#
# Needs the driver, Python 3.11 or later with nvidia-ml-py, nothing else: CUDA is called through ctypes, its kernel is PTX.
# With msgspec a lease is started for real as well. Wheels in .whl/ are installed beside, into a folder of their own.
# Nothing is set on the device. Ends with 0 when every check that could be made holds, 1 when one does not.
set -u
cd "$(dirname "$0")/../.." || exit 1
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G ".whl/*.whl" >/dev/null; then
  site=$(mktemp -d "${TMPDIR:-/tmp}/tg-site.XXXXXX")
  trap 'rm -rf "$site"' EXIT
  for wheel in .whl/*.whl; do # one that does not fit this Python must not keep the others out
    timeout 20 "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheel" ||
      echo "left out: $wheel"
  done
  export PYTHONPATH="$PYTHONPATH:$site" # behind: what the caller put in front, such as a fake, goes first
fi
timeout --signal=TERM --kill-after=9 110 "$python" -m tests.gpu.device_check "$@"
