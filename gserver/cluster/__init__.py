"""What the servers of a cluster know of each other, through Redis.

It owns the heartbeat to Redis and the conclusions from its replies. It must never make a client
wait: it runs in the agent, and workers only read the scoreboard. Start reading in `engines`, then
`heartbeat` and `heartbeat.lua`.
"""
