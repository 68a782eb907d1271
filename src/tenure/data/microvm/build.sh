#!/bin/sh
# Build the first program of microVMs from its source: build.sh [OUT]. Needs gcc and the kernel's headers (linux-libc-dev).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/init-x86_64}
${CC:-gcc} -Os -Wall -Wextra -Werror -std=gnu11 -ffreestanding -fno-stack-protector -fno-asynchronous-unwind-tables -fno-pie -mno-sse \
  -fno-builtin -nostdlib -static -no-pie -Wl,--build-id=none -Wl,-z,noseparate-code -Wl,-z,norelro -Wl,-n -s "$here/init.c" -o "$out"
