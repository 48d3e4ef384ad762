"""Who sits in which row and which blocks, and whose past has to be gathered."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.serve.seats import Seats

LADDER, WIDTH = (4, 8, 16, 32), 8


def request(identity, computed=5, preemptions=0, limit=1000):
    return types.SimpleNamespace(id=identity, computed=computed, preemptions=preemptions, limit=limit)


def test_whoever_stays_keeps_the_row_the_blocks_and_the_past():
    seats, (a, b, c) = Seats(WIDTH), map(request, range(3))

    def take(*requests, rows=4):
        return seats.take(requests, rows, 3, LADDER)

    first = take(a, b, c)
    assert (first.requests, first.blocks) == ((a, b, c, None), ((0,), (1,), (2,), ()))
    assert (first.count, first.missing, first.is_new) == (4, (0, 1, 2), True)
    for one in (a, b, c):
        one.computed += 3
    seats.keep(first)
    for asked in ((b, c), (c, b)):  # the first has ended; the others need a block more
        kept = take(*asked)
        assert (kept.requests, kept.missing, kept.is_new) == ((None, b, c, None), (), False)
        assert kept.blocks == ((), (1, 0), (2, 3), ())
    newcomer = take(b, d := request(3, computed=2))  # in the row of one who went, and a block of his
    assert (newcomer.requests, newcomer.blocks, newcomer.missing) == ((d, b, None, None), ((0,), (1, 2), (), ()), (0,))
    assert take(b, c, request(3)).is_new  # five blocks
    fewer = take(b, c, rows=2)  # one of them moves to another row, and keeps its blocks
    assert (fewer.requests, fewer.blocks, fewer.missing, fewer.is_new) == ((c, b), ((2, 0), (1, 3)), (), False)
    c.preemptions = 1
    assert take(b, c).missing == (2,)
    c.preemptions, b.computed = 0, 9
    assert take(b, c).missing == (1,)  # something else computed a token of it
    seats.clear()
    assert take(b, c).is_new


def test_a_row_has_no_blocks_beyond_its_limit():
    assert Seats(WIDTH).take((request(0, computed=14, limit=17),), 1, 8, LADDER).blocks == ((0, 1),)


def test_blocks_that_nobody_needs_are_left_when_they_are_many():
    seats, (a, b) = Seats(WIDTH), (request(0, computed=80), request(1, computed=20))
    seats.keep(seats.take((a, b), 4, 3, LADDER))
    assert seats.take((a,), 4, 3, LADDER).count == 16
    alone = seats.take((b,), 4, 3, LADDER)
    assert (alone.count, alone.blocks, alone.missing, alone.is_new) == (4, ((0, 1, 2), (), (), ()), (0,), True)
    assert not seats.take((a, b), 4, 3, (*LADDER[:2], 12, 16)).is_new  # a little less would not be worth it


STEPS = st.lists(
    st.tuples(st.sets(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([4, 5]), st.booleans()), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(STEPS, st.lists(st.integers(1, 30), min_size=6, max_size=6))
def test_a_past_that_is_said_to_be_there_is_there(steps, computed):
    """Against blocks that are really filled with (id, position): in a row's blocks lies the past of who sits there."""
    seats, lies, requests = Seats(WIDTH), {}, [request(*of) for of in enumerate(computed)]
    for chosen, size, is_decoded in steps:
        running = [requests[identity] for identity in sorted(chosen)]
        seating = seats.take(running, size, 8, (16, 24, 32, 64, 128))
        assert sorted(one.id for one in seating.requests if one) == sorted(chosen) and len(seating.requests) == size
        taken = [block for blocks in seating.blocks for block in blocks]
        assert len(set(taken)) == len(taken) and all(0 <= block < seating.count for block in taken)

        def place(row, position, seating=seating):
            return seating.blocks[row][position // WIDTH], position % WIDTH

        if seating.is_new:
            lies = {}
        for row in seating.missing:
            one = seating.requests[row]
            lies |= {place(row, at): (one.id, at) for at in range(one.computed)}
        for row, one in enumerate(seating.requests):
            if one:
                assert [lies.get(place(row, at)) for at in range(one.computed)] == [(one.id, at) for at in range(one.computed)]
                lies |= {place(row, one.computed + step): (one.id, one.computed + step) for step in range(8)}
                one.computed += 8
        seats.keep(seating)
        if not is_decoded:  # something else computed a token of each
            for one in running:
                one.computed += 1
