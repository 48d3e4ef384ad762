"""Who sits where in the rows of decoding programs, and whether the past that was gathered for them is still what they have.

Gathering pages costs as much as several steps, and from one dispatch to the next rows mostly stay the same: a request keeps its
row for as long as the number of rows does, and the program adds to the past what it drew. Whatever else happens to a request
(a pass over drafts, preemption) shows in what is compared here, and its past is gathered anew.
"""


class Seats:
    """The rows of the last decoding dispatch."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Nobody sits anywhere: what was gathered is gone, or of no use."""
        self._pages, self._seats = 0, []

    def take(self, requests, rows, pages):
        """Seats requests in `rows` rows with a past of `pages` pages each.

        Returns (a request or None for each row, whether the past of all of them lies there already).
        """
        is_as_before = (rows, pages) == (len(self._seats), self._pages)
        held = {seat[0]: row for row, seat in enumerate(self._seats) if is_as_before and seat is not None}
        seated = [None] * rows
        for request in requests:
            if request.id in held:
                seated[held[request.id]] = request
        free = (row for row, request in enumerate(seated) if request is None)
        for request in requests:
            if request.id not in held:
                seated[next(free)] = request
        states = [request and _state(request) for request in seated]
        is_there = is_as_before and all(state in (None, seat) for state, seat in zip(states, self._seats, strict=True))
        return seated, is_there

    def keep(self, seated, pages):
        """Notes that the past of these requests lies in their rows, up to what is computed of each now."""
        self._pages, self._seats = pages, [request and _state(request) for request in seated]


def _state(request):
    return request.id, request.preemptions, request.computed
