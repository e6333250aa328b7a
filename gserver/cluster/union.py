"""One count out of several Redis: the shares of all servers, merged by id.

Each server reports to every Redis, so each Redis (an *engine*) lists the servers that reach it.
Pure: no Redis, no clock. Moments are milliseconds on the monotonic clock of this machine.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

#: Servers that have gone, and are remembered for each engine; more if they are needed. Redis
#: remembers about as many.
MAX_ENDS = 250


class Share(NamedTuple):
    """What an engine says of a server."""

    clients: int
    #: Of its last heartbeat there: when it was sent, in microseconds of the server's own clock.
    sequence: int
    incarnation: str
    #: The earliest moment at which the server can have sent it.
    confirmed: int
    #: It was reported after this server knew the data of the engine. Otherwise it may be from a
    #: backup.
    is_proven: bool


class End(NamedTuple):
    """What an engine says of a server that has gone."""

    #: It has left; otherwise its lease has ended.
    has_left: bool
    #: Of its last heartbeat there, as in `Share`.
    sequence: int
    incarnation: str
    #: The earliest moment at which that can have been sent.
    at: int
    #: The engine has not said it: it has lost its data, and the server has not come back.
    is_inferred: bool = False

    def is_after(self, share: Share, late_ms: int) -> bool:
        """Whether the server sent this share before it went, or at most `late_ms` later."""
        if share.incarnation == self.incarnation:
            return share.sequence <= self.sequence + late_ms * 1000
        return share.confirmed <= self.at + late_ms


class Total(NamedTuple):
    """The other servers, and when the oldest of their shares was confirmed.

    `doubtful` is the same with the servers that are not in the total, but may be alive.
    """

    clients: int
    servers: int
    confirmed: int
    doubtful: int


class View:
    """What this server knows from one engine, server by server."""

    def __init__(self) -> None:
        #: Whether it has answered for some time, and has all its data: a server that it does not
        #: list has gone, or cannot reach it.
        self.is_steady = False
        #: Whether it does not answer.
        self.is_away = False
        #: The other servers that it has listed last, and in a hold those that are missing.
        self.listed: Mapping[str, Share] = {}
        self.held: Mapping[str, Share] = {}
        #: How the last servers have gone, if it does not list them again, the latest last.
        self.ends: dict[str, End] = {}

    def apply(self, listed: Mapping[str, Share], *, is_held: bool = False) -> None:
        """Take what a reply lists. In a hold, proven shares of missing servers are kept."""
        known = {**self.held, **self.listed}
        listed = {key: _proved(share, known.get(key)) for key, share in listed.items()}
        missing = {key: share for key, share in known.items() if key not in listed}
        self.held = {key: share for key, share in missing.items() if is_held and share.is_proven}
        self.listed = listed
        for server_id, share in missing.items():
            inferred = End(False, share.sequence, share.incarnation, share.confirmed, True)
            self.ends.setdefault(server_id, inferred)
        for server_id in listed:
            self.ends.pop(server_id, None)

    def note_ends(self, ends: dict[str, End]) -> None:
        """Take which servers have gone, as a reply says, the latest first. Then call `apply`."""
        for server_id, end in reversed(ends.items()):
            self.ends.pop(server_id, None)
            self.ends[server_id] = end

    def forget_ends(self, needed: Collection[str]) -> None:
        """Forget how servers have gone, except the last ones, and those that are needed.

        Another engine lists those, or may do so when it comes back.
        """
        surplus = [key for key in self.ends if key not in needed]
        for server_id in surplus[: max(0, len(self.ends) - MAX_ENDS)]:
            del self.ends[server_id]

    def share(self, server_id: str) -> Share | None:
        """Return what it says of a server, or has said."""
        return self.listed.get(server_id) or self.held.get(server_id)


def _proved(share: Share, before: Share | None) -> Share:
    """Return a share, as proven if the server has sent another heartbeat since it was listed."""
    if share.is_proven or before is None or before.incarnation != share.incarnation:
        return share
    is_newer = share.sequence > before.sequence
    is_same = share.sequence == before.sequence and before.is_proven
    return share._replace(is_proven=is_newer or is_same)


def merge(views: Sequence[View], late_ms: int, now: int) -> Total:
    """Return the sum of the newest share of each server. `now` is the age of an empty one.

    A server counts if at least one of its entries is valid. The entry of engine X is not valid if:

    1. engine Y has named the end of the server, and the entry of X is at most `late_ms` newer;
    2. X is away, Y has lost its data, and the server has not come back to Y; the same applies;
    3. Y is steady and does not list the server, and the entry of X is not proven.

    A server without a valid entry that has not left may be alive: it is doubtful.
    """
    ids = {server_id for view in views for server_id in (*view.listed, *view.held)}
    found, doubtful = [], [now]
    for server_id in ids:
        said = [share for view in views if (share := view.share(server_id))]
        ends = [
            end
            for view in views
            if server_id not in view.held and (end := view.ends.get(server_id))
        ]
        if newest := _newest(views, server_id, ends, late_ms):
            found.append(newest)
        elif not any(_has_left(end, said, late_ms) for end in ends):
            moments = [*(share.confirmed for share in said), *(end.at for end in ends)]
            doubtful.append(max(moments))
    confirmed = min([now, *(share.confirmed for share in found)])
    clients = sum(share.clients for share in found)
    return Total(clients, len(found), confirmed, min(confirmed, *doubtful))


def _has_left(end: End, said: Sequence[Share], late_ms: int) -> bool:
    """Whether the server left after all that the engines say of it."""
    return end.has_left and all(end.is_after(share, late_ms) for share in said)


def _newest(
    views: Sequence[View], server_id: str, ends: Sequence[End], late_ms: int
) -> Share | None:
    unlisted = [view for view in views if view.is_steady and not view.share(server_id)]
    shares = [
        share
        for view in views
        if (share := view.share(server_id))
        and not any(
            end.is_after(share, late_ms) for end in ends if view.is_away or not end.is_inferred
        )
        and (share.is_proven or not unlisted)
    ]
    return _latest(shares) if shares else None


def _latest(shares: Sequence[Share]) -> Share:
    """Return the latest share.

    Sequence numbers tell the order of an incarnation; of two incarnations, the one that has
    reported last is there.
    """
    # The share itself makes the result independent of the order of the engines.
    last = max(shares, key=lambda share: (share.confirmed, share))
    same = [share for share in shares if share.incarnation == last.incarnation]
    return max(same, key=lambda share: (share.sequence, share))


class Sum(NamedTuple):
    """The total that one engine keeps, for clusters of too many servers to list."""

    is_current: bool
    #: It has neither failed nor lost data for two TTLs.
    is_steady: bool
    is_held: bool
    servers: int
    #: When it last answered.
    answered: int
    clients: int
    confirmed: int


def choose(sums: Iterable[Sum]) -> Total:
    """Return the best total of several engines.

    The first difference decides: it answers, does not hold, is steady, has more servers, is later.
    """
    best = max(
        sums,
        key=lambda each: (
            each.is_current,
            not each.is_held,
            each.is_steady,
            each.servers,
            each.answered,
        ),
    )
    return Total(best.clients, best.servers - 1, best.confirmed, best.confirmed)
