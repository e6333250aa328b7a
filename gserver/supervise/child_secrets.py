"""Which secrets a child gets: only those that its role needs.

| secret | worker | agent |
| --- | --- | --- |
| certificates and TLS key | yes | no |
| Redis URL with its passwords, admin token | no | yes |

Both come in the instructions. The environment variables of secret options reach no child, so
programs that handlers start do not see them either.
"""

import os
from dataclasses import replace
from typing import Any

from gserver.certificates import Certificates
from gserver.config import SECRETS, Config, environment_names
from gserver.redis_url import RedisUrl
from gserver.supervise.child import AGENT

SECRET_VARIABLES = frozenset(name for option in SECRETS for name in environment_names(option))


def config_for(role: str, config: Config) -> Config:
    """Return the configuration for a child.

    A worker gets no secret, and the Redis URL without its passwords: it only has to know that there
    is a cluster.
    """
    if role == AGENT:
        return config
    for_worker: dict[str, Any] = dict.fromkeys(SECRETS, "")
    if config.redis_url:
        for_worker["redis_url"] = str(RedisUrl.parse(config.redis_url))
    return replace(config, **for_worker)


def certificates_for(role: str, certificates: Certificates) -> Certificates:
    """Return the certificates for a child."""
    return Certificates() if role == AGENT else certificates


def child_environment() -> dict[str, str]:
    """Return this process's environment without the variables of secret options."""
    return {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
