"""The worker process: accepts clients, parses what they send, and answers.

It owns the clients of one worker, and its own slot of the scoreboard. It must never wait for
another process, for Redis or for StatsD. Start reading in `worker`.
"""
