"""Who sits where in the rows of decoding programs, and whose past has to be gathered into their columns.

Gathering pages costs as much as several steps, and from one dispatch to the next rows mostly stay the same: a request keeps its
row for as long as the number of rows and columns does, the program goes on in the columns, and only newcomers are gathered.
Whatever else happens to a request (a pass over drafts, preemption) shows in what is compared here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Seating:
    """The rows of a decoding dispatch.

    requests: a Request or None for each row. columns: that the program has. end: the one in which new tokens begin. missing:
    the rows whose past does not lie before it yet. is_new: nothing lies in any column.
    """

    requests: tuple
    columns: int
    end: int
    missing: tuple[int, ...]
    is_new: bool


class Seats:
    """The rows of the last decoding dispatch."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Nobody sits anywhere: what was gathered is gone, or of no use."""
        self._seats, self._columns, self._end = (), 0, 0

    def take(self, requests, rows, steps, ladder):
        """Returns the Seating of requests in `rows` rows, with room for `steps` more tokens.

        ladder: rising numbers of columns that there are programs for; the last is taken when none has room.
        """
        longest = max(request.computed for request in requests)
        columns = next((columns for columns in ladder if columns >= longest + steps), ladder[-1])
        has_room = longest <= self._end and self._end + steps <= columns
        is_new = (rows, columns) != (len(self._seats), self._columns) or not has_room
        seats, end = ((None,) * rows, longest) if is_new else (self._seats, self._end)
        row_of = {seat[0]: row for row, seat in enumerate(seats) if seat is not None}
        seated = [None] * rows
        for request in requests:
            if request.id in row_of:
                seated[row_of[request.id]] = request
        free = (row for row, request in enumerate(seated) if request is None)
        for request in requests:
            if request.id not in row_of:
                seated[next(free)] = request
        missing = tuple(row for row, request in enumerate(seated) if request and _state(request) != seats[row])
        return Seating(tuple(seated), columns, end, missing, is_new)

    def keep(self, seating, steps):
        """Notes that what is computed of each request now lies in its row, `steps` columns further than before."""
        self._seats = tuple(request and _state(request) for request in seating.requests)
        self._columns, self._end = seating.columns, seating.end + steps


def _state(request):
    return request.id, request.preemptions, request.computed
