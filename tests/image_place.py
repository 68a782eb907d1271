"""Whether images can be made of the programs of this checkout."""

import sys
from pathlib import Path

import tenure


def why_no_image() -> str:
    """Return why not; empty when nothing speaks against it."""
    for path in (Path(tenure.__file__), Path(sys.prefix)):
        if path.is_relative_to("/tmp"):
            return f"{path} lies below /tmp, of which no image holds anything: make the checkout, or its environment, elsewhere"
    return ""
