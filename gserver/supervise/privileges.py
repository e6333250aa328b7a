"""`--user`: root starts the server, for a low port or its own key; it serves as another user."""

import contextlib
import ctypes
import grp
import os
import pwd
import struct
import sys

from gserver.errors import FatalError, UsageError

#: prctl(2): neither this process nor its children gain privileges by execve (setuid programs).
_PR_SET_NO_NEW_PRIVS = 38
#: capset(2): _LINUX_CAPABILITY_VERSION_3.
_CAPABILITY_VERSION = 0x20080522
#: The system calls take this id for "leave it as it is", so it is no user's or group's.
_MAX_ID = 2**32 - 1


def become(user: str) -> None:
    """Become `NAME[:GROUP]` for good, without capabilities; later children too. "" = no change.

    Call it before there are other threads. Raises `UsageError` for an unknown user or root, and
    `FatalError` if the system does not allow it.
    """
    if not user:
        return
    name, uid, gid = _look_up(user)
    try:
        if (os.getresuid(), os.getresgid()) != ((uid,) * 3, (gid,) * 3):
            os.initgroups(name, gid)  # A numeric user has no supplementary groups.
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
    except PermissionError as error:
        raise FatalError(f"--user {user} needs root: start it as root") from error
    if not _drop_capabilities() or _can_be_root():
        raise FatalError(
            f"--user {user}: this system does not allow a process to drop root privileges"
        )
    if not os.access(sys.executable, os.X_OK) or not os.access(__file__, os.R_OK):
        raise FatalError(
            f"--user {user} cannot read {sys.executable} or {__file__}:"
            " install both where that user has access"
        )


def give_socket(path: str, device: int, inode: int, user: str) -> None:
    """Make `NAME[:GROUP]` the owner of a socket file that root has just made. "" = no change.

    Raises what `become` raises. The folder may belong to that user, who could put another file, or
    a link, there.
    """
    if not user:
        return
    _, uid, gid = _look_up(user)
    if os.geteuid() == uid:
        return  # It is that user already.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != (device, inode):
            raise FatalError(f"{path} was replaced by another file while gserver made it")
        os.chown(f"/proc/self/fd/{fd}", uid, gid)
    except PermissionError as error:
        raise FatalError(f"--user {user} needs root: start it as root") from error
    finally:
        os.close(fd)


def _look_up(user: str) -> tuple[str, int, int]:
    """Return the name, user id and group id of `NAME[:GROUP]`; raise `UsageError` for a bad one."""
    name, _, group = user.partition(":")
    try:
        uid = int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
        if group.isdecimal():
            gid = int(group)
        elif group:
            gid = grp.getgrnam(group).gr_gid
        else:
            gid = pwd.getpwuid(uid).pw_gid
    except (KeyError, ValueError):
        uid = gid = 0
    if not (0 < uid < _MAX_ID and 0 <= gid < _MAX_ID):
        raise UsageError(
            f"--user {user}: unknown user or group, or root;"
            " a numeric id that has no name needs USER:GROUP"
        )
    return name, uid, gid


def _drop_capabilities() -> bool:
    """Give up all capabilities, and `execve` as a way to get some; return whether that worked."""
    libc = ctypes.CDLL(None)
    this_process = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.capset(this_process, bytes(24)) == 0)


def _can_be_root() -> bool:
    with contextlib.suppress(OSError):
        os.setuid(0)
        return True
    return False
