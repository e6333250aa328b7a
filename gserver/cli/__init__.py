"""The commands that people type: `gserver serve`, `ask`, `check`, `clients`, `top` and others.

The package owns options, help, and errors as one line with an exit code. It must never contain
behaviour of the server: `serve` passes a `Config` to the supervisor. Start reading in `main`.
"""
