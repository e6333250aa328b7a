"""Whether a worker could start: loads the command module and the certificates, without serving."""

import json
import os
import sys

from gserver.certificates import Certificates
from gserver.config import Config
from gserver.errors import EXIT_CLEAN, UsageError
from gserver.scoreboard import Scoreboard
from gserver.serve import tls
from gserver.serve.command_module import load_commands
from gserver.serve.replies import Replies


def run() -> int:
    """Read options and certificates as JSON from stdin; return the exit code.

    The commands go to stdout as JSON; of an error, the text does.
    """
    given = json.load(sys.stdin)
    config, certificates = Config(**given["config"]), Certificates(**given["certificates"])
    with open(os.devnull) as empty:  # Programs that the module starts must not read the key.
        os.dup2(empty.fileno(), 0)
    # A module may print.
    answer_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        # It has room for so many names.
        replies = Replies(config, Scoreboard.create(1), 0, load_commands(config.commands))
        if certificates.chain:
            tls.make_context(certificates)
    except UsageError as problem:
        os.write(answer_fd, f"{problem}\n".encode())
        return problem.exit_code
    found = [
        {
            "usage": command.usage,
            "may_block": command.may_block,
            "timeout": command.timeout,
            "at_once": command.at_once,
        }
        for command in replies.grammar.commands.values()
    ]
    os.write(answer_fd, json.dumps(found).encode())
    return EXIT_CLEAN
