# SPDX-License-Identifier: MIT
import re
import resource
from pathlib import Path


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes. (On Linux getrusage gives a child its parent's peak.)"""
    try:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    except OSError:  # macOS, whose getrusage counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
