"""Memory that is free, given back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect what only cycles refer to, and let glibc return what was freed between things that are still in use.

    Without it a loop over large temporary tensors holds several times what it uses.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim:
            trim(0)
