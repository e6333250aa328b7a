"""Answers whole lines that cannot block, without a state machine for each client.

This is the hot path, and clever for that reason alone. The parser and a loop over its items take
1.2 us for one command and 17 us for 32. Here a line's meaning is found by one look-up, and how to
answer a read is remembered: a *plan*. With a plan, one command takes 0.4 us and 32 take 0.6. To
make a plan for 32 takes 5 us; built-in commands in upper case are answered without one in 2.5.

For example, `WHO LF why LF` has the kinds of WHO and WHY, 2 and 4. Its plan is the pieces `b""` and
`b"LF 42 LF"`, between which the number goes, and the counts for the cells of the three commands.
"""

from gserver.commands import BUILT_IN, Command, Peer, who
from gserver.errors import ClusterUnavailable
from gserver.protocol import ERROR_REPLIES, ErrorReply
from gserver.serve.replies import Call, Replies, encode

#: Longest read that is split into lines at once. It bounds how long one client can keep others
#: waiting: 512 bytes are at most 256 lines, 0.1 ms.
PIECE_BYTES = 512
#: Plans that are remembered: of reads of up to 64 bytes, and of longer ones. Clients that pipeline
#: often send the same bytes again. After MAX_MISSES reads without a plan, all are forgotten.
MAX_SHORT_BYTES, MAX_SHORT_PLANS, MAX_LONG_PLANS = 64, 1024, 64
MAX_MISSES = 4096
#: Lines whose kind is remembered.
MAX_LINES = 1024

#: First lines of a read that may be nothing but built-in commands in upper case.
_UPPER_CASE = b"WHO\n", b"WHERE\n", b"WHY\n"
#: Stands for the number of clients in a reply until that is known.
_WHO = b"\0"

#: How to answer a read, as a plain tuple, which is made in a quarter of the time of a named one:
#: - the replies, cut where the number of clients belongs,
#: - the cells of the scoreboard to count in, each with how much,
#: - whether unknown commands are in it, since a client's first line may be HTTP or TLS instead,
#: - if own commands are in it, everything to call, in order.
Plan = tuple[list[bytes], list[tuple[int, int]], bool, list[Call]]


class FastPath:
    """Answers for all clients of one worker."""

    def __init__(self, replies: Replies) -> None:
        self._replies = replies
        self._cells = replies.cells
        self._count_clients = replies.count_clients
        self._plans: dict[bytes, Plan] = {}
        self._misses = self._long_plans = 0
        self._lines = _Lines(replies)
        cells = [replies.command_cells[item.name] for item in BUILT_IN]
        self._who_cell, self._where_cell, self._why_cell = cells
        request = replies.request(None)
        self._where_line, self._why_line = (item.answer(request) for item in BUILT_IN[1:])

    def answer(self, data: bytes, has_spoken: bool, sock: Peer | None = None) -> bytes | None:
        """Return the replies to a read, counted; or None, with nothing counted.

        None means that there is something that needs the parser: a line that is not whole, a
        command that may block, an error that closes, a first line that may be HTTP, no reply.
        `has_spoken`: the client has sent a line before. Handlers may ask for its `sock`.
        """
        plan = self._plans.get(data)
        if plan is None:
            # A read that can be remembered is worth a plan; another one is answered at once.
            if data.startswith(_UPPER_CASE) and not self._has_room(data):
                replies = self._answer_upper_case(data)
                if replies is not None:
                    self._count_miss()
                    return replies
            plan = self._plan(data)
            if plan is None:
                return None
        pieces, counts, has_errors, calls = plan
        if has_errors and not has_spoken:
            return None
        if calls:
            return self._replies.reply_to_calls(calls, self._replies.request(sock))
        replies = pieces[0]
        if len(pieces) > 1:
            try:
                replies = encode(self._count_clients()).join(pieces)
            except ClusterUnavailable:
                return None
        cells = self._cells
        for cell, number in counts:
            cells[cell] += number
        return replies

    def _answer_upper_case(self, data: bytes) -> bytes | None:
        """Answer WHO, WHERE and WHY with LF and nothing else, without cutting them into lines."""
        whos, wheres, whys = data.count(b"WHO\n"), data.count(b"WHERE\n"), data.count(b"WHY\n")
        # None of the three contains another, so the lengths add up only if there is nothing else.
        if 4 * (whos + whys) + 6 * wheres != len(data):
            return None
        try:
            who_line = encode(self._count_clients()) if whos else b""
        except ClusterUnavailable:
            return None
        cells = self._cells
        cells[self._who_cell] += whos
        cells[self._where_cell] += wheres
        cells[self._why_cell] += whys
        replies = data.replace(b"WHO\n", who_line).replace(b"WHY\n", self._why_line)
        # WHERE's come last: an id may contain the name of a command.
        return replies.replace(b"WHERE\n", self._where_line)

    def _has_room(self, data: bytes) -> bool:
        """Whether the plan of a read can be remembered."""
        if len(data) <= MAX_SHORT_BYTES:
            return len(self._plans) < MAX_SHORT_PLANS
        return self._long_plans < MAX_LONG_PLANS and len(data) <= PIECE_BYTES

    def _remember(self, data: bytes, plan: Plan) -> None:
        if self._has_room(data):
            self._plans[data] = plan
            if len(data) > MAX_SHORT_BYTES:
                self._long_plans += 1
        else:
            self._count_miss()

    def _count_miss(self) -> None:
        """Forget all plans after many reads without one: other reads may be the usual ones now."""
        self._misses += 1
        if self._misses == MAX_MISSES:
            self._misses = self._long_plans = 0
            self._plans.clear()

    def _plan(self, data: bytes) -> Plan | None:
        """Find out how to answer whole lines, and remember it; None for what needs the parser."""
        if len(data) > PIECE_BYTES or not data.endswith(b"\n"):
            return None
        lines = self._lines
        kinds = bytes(map(lines.__getitem__, data[:-1].split(b"\n")))
        others = kinds.translate(None, lines.built_in)
        if _SLOW in others or not kinds.strip(_BLANKS):
            return None
        if others:
            counts = [(cell, kinds.count(kind)) for kind, cell in lines.cells if kind in kinds]
        else:
            counts = [(cell, kinds.count(kind)) for kind, cell in lines.cells_of_built_in]
        pieces = b"".join(map(lines.replies.__getitem__, kinds)).split(_WHO)
        has_errors = bool(others) and any(kind in others for kind in lines.errors)
        calls: list[Call] = []
        if others and any(kind in others for kind in lines.own):
            calls = [lines.calls[kind] for kind in kinds if kind != _BLANK]
        plan = pieces, counts, has_errors, calls
        self._remember(data, plan)
        return plan


#: The kinds of lines that every server has: see `_Lines`.
_BLANK, _SLOW = 0, 1
_BLANKS = bytes([_BLANK])


class _Lines(dict[bytes, int]):
    """The kind of each line without its LF, remembered once it is known.

    A kind is a small number, so that the kinds of a read are a bytes object, which is counted and
    searched in a tenth of the time of a list. The first two are `_BLANK` and `_SLOW`, which is for
    what the fast path leaves to the parser; the others are commands and error replies.
    """

    def __init__(self, replies: Replies) -> None:
        super().__init__()
        self._grammar = replies.grammar
        self._kinds: dict[Command | ErrorReply, int] = {}
        #: By kind: the constant reply, or where the number of clients goes; what to call instead.
        self.replies = [b"", b""]
        self.calls: dict[int, Call] = {}
        #: Each kind that is counted, with its cell; the kinds of own commands, and of errors.
        self.cells: list[tuple[int, int]] = []
        self.own: list[int] = []
        self.errors: list[int] = []
        names = {item.name for item in BUILT_IN}
        for command in replies.grammar.commands.values():
            cell = replies.command_cells[command.name]
            if command.may_block or command.parameters.takes_words:
                self._kinds[command] = _SLOW
            elif command.name not in names:
                self.own.append(self._add(command, b"", cell, replies))
            else:
                reply = _WHO if command.name == who.name else command.answer(replies.request(None))
                self._add(command, reply, cell, replies)
        for error in ERROR_REPLIES:
            cell = replies.error_cells[error.name]
            if error.closes:
                self._kinds[error] = _SLOW
            else:
                self.errors.append(self._add(error, error.reply, cell, replies))

        kinds = [kind for item, kind in self._kinds.items() if item.name in names]
        self.built_in = bytes(kinds)
        self.cells_of_built_in = [(kind, cell) for kind, cell in self.cells if kind in kinds]

    def _add(self, item: Command | ErrorReply, reply: bytes, cell: int, replies: Replies) -> int:
        kind = self._kinds[item] = len(self.replies)
        self.replies.append(reply)
        self.calls[kind] = replies.call_for(item)
        self.cells.append((kind, cell))
        return kind

    def __missing__(self, line: bytes) -> int:
        item = self._grammar.read(line)
        # A command with words, or a usage error, is made anew for its line: not quick.
        kind = _BLANK if item is None else self._kinds.get(item, _SLOW)
        if len(line) <= MAX_SHORT_BYTES:
            if len(self) == MAX_LINES:
                self.clear()
            self[line] = kind
        return kind
