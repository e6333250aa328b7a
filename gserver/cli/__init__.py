"""What a person types: `gserver serve`, `ask`, `status` and `top`.

It owns options, help, and errors in one line with an exit code. It must never contain behaviour
of the server: `serve` hands a `Config` to the supervisor. Start reading in `main`.
"""
