"""Files that nobody but their owner may read, for they quote users.

Imports nothing but the standard library: what an error leaves behind is such a file too.
"""

from __future__ import annotations

import os
import stat
import sys

MODE = 0o600


def only_mine(path: str | os.PathLike[str], flags: int) -> int:
    """An `opener` for `open`: others may not read the file, whatever the umask and whatever was there before.

    A file whose rights cannot be changed (it is another user's, or its file system has no rights) is written all the
    same, with a warning.
    """
    descriptor = os.open(path, flags, MODE)
    now = os.fstat(descriptor).st_mode
    if stat.S_ISREG(now) and stat.S_IMODE(now) != MODE:
        try:
            os.fchmod(descriptor, MODE)
        except PermissionError:
            print(f"{path}: quotes users, and others may be able to read it: its rights are fixed", file=sys.stderr)
    return descriptor
