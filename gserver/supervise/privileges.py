"""Which user gserver is: started as root, for a port below 1024 or a key of root's, it serves as another (`--user`)."""

import contextlib
import ctypes
import grp
import os
import pwd
import struct
import sys

from gserver.errors import FatalError, UsageError


def become(who: str) -> None:
    """Be `NAME[:GROUP]` from now on ("" = as it is), with its later children: for good, and without
    a capability.

    Call it before there are other threads. Raises `UsageError` for who is unknown or root,
    `FatalError` when it may not be.
    """
    if not who:
        return
    name, _, group = who.partition(":")
    try:
        uid = int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
        gid = (
            int(group)
            if group.isdecimal()
            else grp.getgrnam(group).gr_gid
            if group
            else pwd.getpwuid(uid).pw_gid
        )
    except (KeyError, ValueError):
        uid = gid = 0
    if not 0 < uid < 2**32 - 1 > gid:  # That one is no id: the system calls take it for "as it is".
        raise UsageError(
            f"--user {who}: name a user and a group that exist, and not root (an id without a name: both)"
        )
    try:
        if (os.getresuid(), os.getresgid()) != ((uid,) * 3, (gid,) * 3):
            os.initgroups(name, gid)  # A number has no group beside.
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
    except PermissionError as error:
        raise FatalError(
            f"--user {who}: start it as root, who alone may become another user"
        ) from error
    libc, capabilities = (
        ctypes.CDLL(None),
        struct.pack("Ii", 0x20080522, 0),
    )  # Version 3, of this process: capset(2).
    is_confined = (
        libc.prctl(38, 1, 0, 0, 0) == libc.capset(capabilities, bytes(24)) == 0
    )  # PR_SET_NO_NEW_PRIVS
    with contextlib.suppress(OSError):
        os.setuid(0)
        is_confined = False
    if not is_confined:
        raise FatalError(f"--user {who}: this system does not let a process give up what root may")
    if not os.access(sys.executable, os.X_OK) or not os.access(__file__, os.R_OK):
        raise FatalError(
            f"--user {who} may not use {sys.executable} or {__file__}: have both where it may"
        )
