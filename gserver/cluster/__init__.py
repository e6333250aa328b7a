"""What servers know of each other, through Redis.

It owns the heartbeat to Redis and what is made of the replies. It must never make a client wait:
it runs in the agent, and workers only read the scoreboard. Start reading in `heartbeat`.
"""
