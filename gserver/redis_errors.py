"""Kinds of failed heartbeats: their names in metrics and logs, and how each is recognised.

Pure. An error is of the first kind whose pattern is found in it or in its causes. The codes of
Redis are searched for in the text, because redis-py has classes for only some of them.
"""

#: "auth": inside a script, a missing permission has no code. Redis 7.0 writes "The user executing
#: the script can't run this command", Redis 8 and Valkey "ACL failure in script".
#: "name": for a host name that cannot be encoded, Python 3.13 raises a UnicodeEncodeError, earlier
#: ones a UnicodeError. A UnicodeDecodeError is another thing: a reply that is not UTF-8.
HEARTBEAT_ERRORS = {
    "name": "gaierror|Unicode(Encode)?Error",
    "tls": r"\bSSL",
    "auth": "Authentication|NOAUTH|unauthenticated|WRONGPASS|NOPERM|NoPermission"
    "|ACL failure in script|user executing the script",
    "no_primary": "NoPrimary",
    "timeout": "Timeout|timed out",
    "read_only": "READONLY|ReadOnly",
    "out_of_memory": r"\bOOM\b|OutOfMemory",
    "loading": "LOADING|BusyLoading",
    "busy": r"\bBUSY\b",
    "cannot_save": "MISCONF",
    "no_replicas": "NOREPLICAS",
    "connection": "Connection|OSError",
    "other": "",
}
