"""Who sits where in the rows and blocks of decoding programs, and whose past has to be gathered into them.

Gathering pages costs as much as several steps, and from one dispatch to the next rows mostly stay the same: a request keeps its
row and its blocks for as long as the program has as many rows and blocks, the program goes on in them, and only newcomers are
gathered. Whatever else happens to a request (a pass over drafts, preemption) shows in what is compared here.
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
        self._rows, self._count = (), 0

    def take(self, requests, rows, steps, ladder):
        """Returns the Seating of requests in `rows` rows, with room for `steps` more tokens of each, within its limit.

        ladder: rising numbers of blocks that there are programs for; the last is enough for all.
        """
        # The last token that a request may have is not computed any more.
        needs = {r.id: -(-min(r.computed + steps, r.limit - 1) // self.width) for r in requests}
        least = next(count for count in ladder if count >= sum(needs.values()))
        # What a smaller program saves is paid for by gathering anew: it has to be a good deal smaller.
        is_new = rows != len(self._rows) or not least <= self._count <= _MOST_TOO_MANY * least
        kept = [] if is_new else self._rows
        count = least if is_new else self._count
        row_of = {seat[0][0]: row for row, seat in enumerate(kept) if seat is not None}
        seated = [None] * rows
        for request in requests:
            if request.id in row_of:
                seated[row_of[request.id]] = request
        empty = (row for row, request in enumerate(seated) if request is None)
        for request in requests:
            if request.id not in row_of:
                seated[next(empty)] = request
        missing = tuple(
            row for row, request in enumerate(seated) if request and (is_new or (kept[row] or (None,))[0] != _state(request))
        )
        held = [kept[row][1] if request and row not in missing else () for row, request in enumerate(seated)]
        free = iter(sorted(set(range(count)).difference(*held)))
        blocks = tuple(
            (*blocks, *(next(free) for _ in range(needs[request.id] - len(blocks)))) if request else ()
            for request, blocks in zip(seated, held, strict=True)
        )
        return Seating(tuple(seated), blocks, count, missing, is_new)

    def keep(self, seating):
        """Notes that what is computed of each request now lies in its row's blocks."""
        rows = zip(seating.requests, seating.blocks, strict=True)
        self._rows, self._count = tuple(request and (_state(request), blocks) for request, blocks in rows), seating.count


_MOST_TOO_MANY = 1.4


def _state(request):
    return request.id, request.preemptions, request.computed
