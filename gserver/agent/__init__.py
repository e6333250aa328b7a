"""The agent process: tells the outside what the scoreboard says, and talks to the cluster's Redis.

It owns StatsD, the admin port, and the process in which `gserver.cluster` runs. It must never be
needed for a reply: when it hangs or dies, workers go on. Start reading in `agent`.
"""
