"""Who sits in which row, and whose past has to be gathered."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.serve.seats import Seats

LADDER = (16, 32, 64)


def request(identity, computed=5, preemptions=0):
    return types.SimpleNamespace(id=identity, computed=computed, preemptions=preemptions)


def test_whoever_stays_keeps_the_row_and_the_past():
    seats, (a, b, c) = Seats(), map(request, range(3))

    def take(*requests, rows=4):
        return seats.take(requests, rows, 8, LADDER)

    first = take(a, b, c)
    assert (first.requests, first.missing, first.is_new) == ((a, b, c, None), (0, 1, 2), True)
    assert (first.columns, first.end) == (16, 5)
    for one in (a, b, c):
        one.computed += 3
    seats.keep(first, 3)
    for asked in ((b, c), (c, b)):  # the first has ended
        kept = take(*asked)
        assert (kept.requests, kept.missing, kept.is_new, kept.end) == ((None, b, c, None), (), False, 8)
    newcomer = take(b, c, d := request(3, computed=2))
    assert (newcomer.requests, newcomer.missing, newcomer.is_new) == ((d, b, c, None), (0,), False)
    assert take(b, c, request(3, computed=9)).is_new  # longer than what lies there
    assert take(b, c, rows=2).is_new
    b.computed += 1
    assert take(b, c).is_new  # its past would not end where that of the others does
    b.computed, c.preemptions = 8, 1
    assert take(b, c).missing == (2,)
    c.preemptions = 0
    seats.keep(kept, 8)
    b.computed = c.computed = 16
    assert (take(b, c).columns, take(b, c).is_new) == (32, True)  # no room for eight more
    seats.clear()
    assert take(b, c).is_new


def test_columns_that_nobody_needs_are_left():
    seats, (a, b) = Seats(), (request(0, computed=40), request(1, computed=3))
    seats.keep(seats.take((a, b), 4, 8, LADDER), 8)
    b.computed += 8
    alone = seats.take((b,), 4, 8, LADDER)
    assert (alone.columns, alone.end, alone.missing, alone.is_new) == (32, 11, (0,), True)


STEPS = st.lists(
    st.tuples(st.sets(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([4, 5]), st.booleans()), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_a_past_that_is_said_to_be_there_is_there(steps, computed):
    """Against columns that are really filled with (id, position): before the end of a row lies the past of who sits there."""
    seats, columns, requests = Seats(), {}, [request(*of) for of in enumerate(computed)]
    for chosen, size, is_decoded in steps:
        running = [requests[identity] for identity in sorted(chosen)]
        seating = seats.take(running, size, 8, (16, 32, 64, 128))
        assert sorted(one.id for one in seating.requests if one) == sorted(chosen) and len(seating.requests) == size
        assert seating.columns >= seating.end + 8 and seating.end >= max(one.computed for one in running)
        if seating.is_new:
            columns = {}
        for row in seating.missing:
            one = seating.requests[row]
            columns |= {(row, seating.end - one.computed + at): (one.id, at) for at in range(one.computed)}
        for row, one in enumerate(seating.requests):
            if one:
                lies = [columns.get((row, column)) for column in range(seating.end - one.computed, seating.end)]
                assert lies == [(one.id, at) for at in range(one.computed)]
                columns |= {(row, seating.end + step): (one.id, one.computed + step) for step in range(8)}
                one.computed += 8
        seats.keep(seating, 8)
        if not is_decoded:  # something else computed a token of each
            for one in running:
                one.computed += 1
