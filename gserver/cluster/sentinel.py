"""The address of the primary, as the Sentinels give it.

One Sentinel may be cut off from the others and still name the primary of before. So Sentinels take
turns, and one that does not know the last failover is passed over.
"""

import random
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any, cast

import redis

from gserver.redis_url import RedisUrl

Address = tuple[str, int]


class NoPrimaryError(redis.ConnectionError):
    """No Sentinel names a primary."""


class SentinelFollower:
    """Follows the primary of one service.

    `connect` opens a client with redis-py's arguments. `check_seconds` is the time between two
    checks of whether the primary has moved.
    """

    def __init__(
        self, url: RedisUrl, check_seconds: float, connect: Callable[..., redis.Redis]
    ) -> None:
        self._service = url.service
        self._login = {
            "username": url.sentinel_username or None,
            "password": url.sentinel_password or None,
        }
        self._check_seconds = check_seconds
        self._connect = connect
        #: The first one is asked next. Each server begins with another one.
        self.addresses = deque(random.sample(url.hosts, len(url.hosts)))
        self._primary: Address = ("", 0)
        self._check_at = 0.0
        #: Number of the last failover that a Sentinel has reported.
        self._epoch = 0
        #: How many Sentinels in a row did not know that failover.
        self._outdated_answers = 0

    def find_primary(self) -> Address:
        """Ask the Sentinels in turn; raise `NoPrimaryError` if none of them names a primary."""
        reasons = []
        for address in list(self.addresses):
            try:
                return self._ask(address)
            except Exception as error:  # noqa: BLE001 - any failure: ask the next one
                reasons.append(f"{address[0]}:{address[1]}: {error}")
                self.skip()
        # The Sentinels may have been set up again, which restarts the count of failovers: the next
        # attempt accepts any epoch.
        self._epoch = 0
        raise NoPrimaryError("no Sentinel names a primary: " + "; ".join(reasons))

    def has_moved(self) -> bool:
        """Whether the primary has changed; asks a Sentinel at most once in `check_seconds`.

        A primary that was replaced while it lives accepts heartbeats for about ten seconds more.
        Another Sentinel is asked each time, because the last one may be cut off from the others.
        """
        if monotonic() < self._check_at:
            return False
        last_primary = self._primary
        self.skip()
        try:
            return self._ask(self.addresses[0]) != last_primary
        except Exception:  # noqa: BLE001 - any failure: another one is asked later
            return False

    def skip(self) -> None:
        """Ask another Sentinel the next time."""
        self.addresses.rotate(-1)

    def _ask(self, address: Address) -> Address:
        self._check_at = monotonic() + self._check_seconds
        outdated_answers, self._outdated_answers = self._outdated_answers, 0
        host, port = address
        with self._connect(host=host, port=port, **self._login) as sentinel:
            epoch = self._epoch_of(sentinel)
            primary = cast(Any, sentinel.sentinel_get_master_addr_by_name(self._service))
        if not primary:
            raise NoPrimaryError(f"knows no service {self._service}")
        # If all of them in a row are outdated, they have been set up again: believe them.
        if epoch < self._epoch and outdated_answers + 1 < len(self.addresses):
            self._outdated_answers = outdated_answers + 1
            raise NoPrimaryError("does not know the last failover")
        self._epoch = epoch
        self._primary = (primary[0].decode(), int(primary[1]))
        return self._primary

    def _epoch_of(self, sentinel: redis.Redis) -> int:
        """Return the number of the last failover, or the last known one if it is not given."""
        try:
            return int(cast(Any, sentinel.sentinel_master(self._service))["config-epoch"])
        except (redis.ResponseError, KeyError, ValueError):
            return self._epoch
