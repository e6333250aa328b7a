"""Seeds of random runs: a new one each time, or the one in a variable."""

import os
from random import SystemRandom


def draw(variable: str = "") -> int:
    return int(os.environ.get(variable) or 0) or SystemRandom().randrange(1, 1_000_000)
