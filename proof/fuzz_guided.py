"""The child of `bin/fuzz core` in which Atheris draws the inputs.

`python -m proof.fuzz_guided INPUTS SEED`
"""

import sys
from random import Random

import atheris

with atheris.instrument_imports(
    include=["gserver.protocol", "gserver.serve.fastpath", "gserver.redis_url"],
    enable_loader_override=False,
):
    # Before proof.fuzz_core imports them without instrumentation.
    import gserver.protocol
    import gserver.redis_url
    import gserver.serve.fastpath  # noqa: F401
from lab import wire
from proof import fuzz_core

PARSER, FAST_PATH = fuzz_core.ParserTarget(Random(1)), fuzz_core.FastPathTarget(Random(1))
URL = fuzz_core.UrlTarget(Random(1))


def one(data: bytes) -> None:
    """Give one input to each target; its first bytes select the limits and the splits."""
    if len(data) < 3:
        return
    table, limit = fuzz_core.TABLES[data[0] % 3], fuzz_core.LIMITS[data[1] % len(fuzz_core.LIMITS)]
    sent = data[3:]
    cut = wire.pieces(Random(data[2]), sent, 6)
    silent = [part for piece in cut for part in (piece, wire.SILENCE)]
    PARSER.check((table, limit, [[sent], [*cut], silent]))
    FAST_PATH.check(sent)
    URL.check(sent.decode("latin1"))


if __name__ == "__main__":
    atheris.Setup(
        [sys.argv[0], f"-runs={sys.argv[1]}", f"-seed={sys.argv[2]}", "-max_len=160"], one
    )
    atheris.Fuzz()
