"""The agent process: shows the server's figures to the outside, and talks to the cluster's Redis.

It owns StatsD and the admin port, and it is the process in which `gserver.cluster` runs. A reply
must never depend on it: when it hangs or dies, the workers go on. Start reading in `agent`.
"""
