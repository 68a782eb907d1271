"""The CPU's model, and those of its features that matter to results or speed. Loads nothing, for workers that begin often."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_FEATURES = re.compile(
    r"sse4_[12]|avx\w*|fma4?|f16c|amx_\w+|bmi[12]"  # x86
    r"|asimd\w*|sve\w*|sme2?|bf16|i8mm|neon|vfpv4"  # Arm
)
"""Flags that change which floating-point kernels a library picks, hence results or speed."""


def cpu() -> tuple[str, tuple[str, ...]]:
    """Return the CPU's model and its features that matter to results or speed, those that every core has."""
    model, features = "", None
    for block in _cpuinfo().split("\n\n"):
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        model = model or fields.get("model name", "") or fields.get("CPU part", "")
        flags = fields.get("flags") or fields.get("Features")
        if flags:
            here = {flag for flag in flags.split() if _FEATURES.fullmatch(flag)}
            features = here if features is None else features & here
    return model or platform.processor() or platform.machine(), tuple(sorted(features or ()))


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
