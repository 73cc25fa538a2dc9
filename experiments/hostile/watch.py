"""What a hostile program may have left behind: files and processes."""

import contextlib
import ctypes
import os
import time
from pathlib import Path

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER


def changed_since(moment: float, folders: list[str]) -> list[str]:
    """Files that were written, made or changed, without caches and hidden folders."""
    found = []
    for folder in folders:
        for path in Path(folder).rglob("*"):
            parts = path.relative_to(folder).parts
            is_hidden = any(part.startswith((".", "__pycache__")) for part in parts)
            if not is_hidden and not path.is_dir() and path.lstat().st_ctime > moment:
                found.append(str(path))
    return found


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)


def running_children() -> list[str]:
    """Processes that are left: whatever lost its parent became a child of this process."""
    end = time.monotonic() + 2  # what has been killed may take a moment to end
    while (left := _children()) and time.monotonic() < end:
        time.sleep(0.02)
    return left


def _children() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(path.parent.name)
    return found
