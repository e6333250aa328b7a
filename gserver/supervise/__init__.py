"""The supervisor process: starts, watches and replaces the others.

It owns the listening sockets, the scoreboard, the signals and the exit code. It must never serve a
client, import gevent or talk to a network, so that next to nothing in it can break. Start reading
in `supervisor`.
"""
