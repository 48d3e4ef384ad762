"""Who sits where in the rows and blocks of decoding programs, and whose past has to be gathered into them.

Gathering pages costs as much as several steps, and from one dispatch to the next rows mostly stay the same: a request keeps its
blocks for as long as programs have as many of them, whatever their rows, and only newcomers are gathered. Whatever else happens
to a request (a pass over drafts, preemption) shows in what is compared here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Seating:
    """The rows and blocks of a decoding dispatch.

    requests: a Request or None for each row. blocks: the indices of each row's blocks, in the order of its tokens; `count` are
    there in all. missing: the rows whose past does not lie in them yet. is_new: nothing lies in any block.
    """

    requests: tuple
    blocks: tuple
    count: int
    missing: tuple[int, ...]
    is_new: bool


class Seats:
    """The rows and blocks of the last decoding dispatch. width: tokens of a block."""

    def __init__(self, width):
        self.width = width
        self.clear()

    def clear(self):
        """Nobody sits anywhere: what was gathered is gone, or of no use."""
        self._seats, self._count = {}, 0  # id -> (state, row, blocks)

    def take(self, requests, rows, steps, ladder):
        """Returns the Seating of requests in `rows` rows, with room for `steps` more tokens of each, within its limit.

        ladder: rising numbers of blocks that there are programs for; the last is enough for all.
        """
        # The last token that a request may have is not computed any more.
        needs = {r.id: -(-min(r.computed + steps, r.limit - 1) // self.width) for r in requests}
        least = next(count for count in ladder if count >= sum(needs.values()))
        # What a smaller program saves is paid for by gathering anew: it has to be a good deal smaller.
        is_new = self._count not in ladder or not least <= self._count <= _MOST_TOO_MANY * least
        seats, count = ({}, least) if is_new else (self._seats, self._count)
        seated, others = [None] * rows, []
        for request in requests:
            row = seats[request.id][1] if request.id in seats else rows
            if row < rows:
                seated[row] = request
            else:
                others.append(request)
        for request in others:
            seated[seated.index(None)] = request
        held = {r.id: seats[r.id][2] for r in requests if r.id in seats and seats[r.id][0] == _state(r)}
        free = iter(sorted(set(range(count)).difference(*held.values())))
        blocks = []
        for request in seated:
            known = held.get(request.id, ()) if request else ()
            more = needs[request.id] - len(known) if request else 0
            blocks.append((*known, *(next(free) for _ in range(more))))
        missing = tuple(row for row, request in enumerate(seated) if request and request.id not in held)
        return Seating(tuple(seated), tuple(blocks), count, missing, is_new)

    def keep(self, seating):
        """Notes that what is computed of each request now lies in its row's blocks."""
        rows = enumerate(zip(seating.requests, seating.blocks, strict=True))
        self._seats = {request.id: (_state(request), row, blocks) for row, (request, blocks) in rows if request}
        self._count = seating.count


_MOST_TOO_MANY = 1.4


def _state(request):
    return request.preemptions, request.computed
