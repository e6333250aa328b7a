"""Kinds of failed heartbeats to Redis: their names in metrics and logs, and how each is recognised.

Pure. An error is of the first kind whose pattern is found in it or in its causes. Redis's own codes
are looked for in the text, because redis-py has classes for only some of them.
"""

HEARTBEAT_ERRORS = {
    "name": "gaierror|UnicodeError",
    "tls": r"\bSSL",
    "auth": "Authentication|NOAUTH|unauthenticated|WRONGPASS|NOPERM|NoPermission|user executing the script",
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
