"""A model of the heartbeat script, in Python."""

from dataclasses import dataclass

from gserver.cluster.membership import Heartbeat, Reply

#: Milliseconds; no lease ends because a machine is slow.
TTL, INTERVAL = 60_000, 6000


@dataclass
class Entry:
    clients: int
    sequence: int
    incarnation: str
    lease_end: int


class Model:
    """The script's effects in Python, with the time as an argument.

    Valid for clusters whose keys no other program writes.
    """

    def __init__(self) -> None:
        self.lose_all()

    def lose_all(self) -> None:
        self.entries: dict[str, Entry] = {}
        #: The last sequence number of each incarnation of a server that has left, and when.
        self.left: dict[tuple[str, str], tuple[int, int]] = {}
        self.clock = self.lost_at = 0
        self.returned: list[str] = []
        self.heartbeat_at: int | None = None
        self.resumed_at = 0

    def _look(self, heartbeat: Heartbeat, now: int) -> tuple[Entry | None, int, bool]:
        """Discard outdated data; return the entry, the pause before, whether it is late."""
        acked_sequence, last_clock = heartbeat.acked_sequence, heartbeat.last_clock
        ttl, interval = heartbeat.ttl_ms, heartbeat.interval_ms
        before = self.entries.get(heartbeat.server_id)
        elapsed = 0 if self.heartbeat_at is None else now - self.heartbeat_at
        is_unproven = self.resumed_at > 0 and self.clock - self.resumed_at < ttl
        is_older = (
            before is not None
            and before.incarnation == heartbeat.incarnation
            and acked_sequence > before.sequence
        )
        # It was acknowledged so recently that its lease cannot have ended.
        is_entry_lost = (
            before is None
            and acked_sequence > 0
            and last_clock >= self.lost_at
            and self.clock - last_clock < ttl
            and not self._has_left_since(heartbeat)
            and (is_unproven or elapsed > interval)
        )
        is_behind = last_clock - self.clock > 2 * interval and (
            is_unproven or elapsed > 2 * interval
        )
        if self.heartbeat_at is None or is_older or is_entry_lost or is_behind:
            self.lose_all()
            self.clock = self.lost_at = max(last_clock + 1, now)
            return None, 0, False
        has_lease_ended = self.clock - max(last_clock, heartbeat.told_clock) >= ttl
        has_left_since = heartbeat.clients != "leave" and self._has_left_since(heartbeat)
        is_late = before is None and (has_lease_ended or has_left_since)
        return before, elapsed, is_late

    def _has_left_since(self, heartbeat: Heartbeat) -> bool:
        key = heartbeat.server_id, heartbeat.incarnation
        sequence, left_at = self.left.get(key, (-1, -1))
        return sequence >= heartbeat.sequence and left_at >= heartbeat.told_clock

    def _note_pause(self, heartbeat: Heartbeat, before: Entry | None, elapsed: int) -> None:
        """Note who ended a pause: only a server that knew the data vouches for them."""
        is_mine = before is not None and before.incarnation == heartbeat.incarnation
        knows_data = is_mine and heartbeat.acked_sequence > 0
        if knows_data and heartbeat.last_clock < self.resumed_at:
            self.resumed_at = 0
        elif not knows_data and self.entries and elapsed > 2 * heartbeat.interval_ms:
            self.resumed_at = self.clock

    def apply(self, heartbeat: Heartbeat, now: int) -> Reply:
        server_id, incarnation = heartbeat.server_id, heartbeat.incarnation
        sequence, acked_sequence = heartbeat.sequence, heartbeat.acked_sequence
        ttl, interval, last_clock = heartbeat.ttl_ms, heartbeat.interval_ms, heartbeat.last_clock
        before, elapsed, is_late = self._look(heartbeat, now)
        self.clock += max(0, min(elapsed, interval))
        self._note_pause(heartbeat, before, elapsed)
        self.heartbeat_at = now
        holder = before.incarnation if before else ""
        was_missing = not before and acked_sequence > 0
        may_write = not is_late
        if before:
            is_newer = holder == incarnation and sequence > before.sequence
            may_write = is_newer or holder == heartbeat.replaced_incarnation
        if may_write:
            if heartbeat.clients == "leave":
                self.entries.pop(server_id, None)
                self.left[server_id, incarnation] = sequence, self.clock
            else:
                if was_missing:
                    self.returned.append(incarnation)
                sent_at = self.clock
                if heartbeat.told_clock >= self.lost_at:
                    sent_at = min(sent_at, heartbeat.told_clock)
                elif last_clock >= self.lost_at:
                    sent_at = min(sent_at, last_clock + heartbeat.last_clock_age_ms)
                lease_end = sent_at + ttl
                self.entries[server_id] = Entry(
                    int(heartbeat.clients), sequence, incarnation, lease_end
                )
                holder = incarnation
        self.entries = {
            name: entry for name, entry in self.entries.items() if entry.lease_end > self.clock
        }
        total_clients = sum(entry.clients for entry in self.entries.values())
        lease_end = self.entries[server_id].lease_end if server_id in self.entries else 0
        holder = holder if lease_end else ""
        return Reply(
            total_clients,
            len(self.entries),
            len(self.returned),
            self.clock,
            self.lost_at,
            holder,
            lease_end,
            int(was_missing),
            min((e.lease_end for name, e in self.entries.items() if name != server_id), default=0),
            int(is_late),
        )
