#!/usr/bin/env bash
# Make the virtual environment and install Tenure with one extra into it. Called by the Makefile; safe to call again.
#   tools/setup.sh VENV EXTRA        (EXTRA: demo | dev)
# Needs no root. Says in one line per step what it does, and on failure what was wrong and what to do.
set -u
venv=$1
extra=$2
here=$(cd "$(dirname "$0")/.." && pwd)
cd "$here" || exit 1

die() { printf 'make: %s\n' "$@" >&2; exit 1; }

fits() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.13 python; do
    if fits "$candidate"; then printf '%s\n' "$candidate"; return 0; fi
    if [ "$candidate" = "${PYTHON:-}" ]; then return 1; fi
  done
  return 1
}

if ! [ -x "$venv/bin/python" ] || ! fits "$venv/bin/python"; then
  python=$(find_python) || {
    found=$(python3 --version 2>&1 || echo "no python3")
    if [ -n "${PYTHON:-}" ]; then found="PYTHON=$PYTHON, which is not one"; fi
    die "Tenure needs Python 3.11 or newer; found: $found." \
        "Install one (Debian 12 or newer: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.11"
  }
  echo "make: making $venv with $("$python" --version 2>&1)"
  rm -rf "$venv"
  if ! log=$("$python" -m venv "$venv" 2>&1) || ! [ -x "$venv/bin/pip" ]; then
    rm -rf "$venv"
    printf '%s\n' "$log" | tail -5 >&2
    die "$python cannot make a virtual environment (its venv or ensurepip module is missing)." \
        "On Debian and Ubuntu: apt-get install python3-venv. Then run make again."
  fi
fi

echo "make: installing tenure[$extra] and what it needs (a minute or two the first time)"
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c tools/constraints.txt -e ".[$extra]" >"$venv/install.log" 2>&1; then
  tail -15 "$venv/install.log" >&2
  die "pip could not install tenure[$extra]; the reason stands above, the whole log is $venv/install.log."
fi
touch "$venv/.with-$extra"
if [ "$extra" = dev ]; then touch "$venv/.with-demo"; fi # dev includes demo
