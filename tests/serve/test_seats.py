"""Who sits in which row, and when a past has to be gathered anew."""

import types

from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.serve.seats import Seats


def request(identity, computed=5, preemptions=0):
    return types.SimpleNamespace(id=identity, computed=computed, preemptions=preemptions)


def test_whoever_stays_keeps_the_row_and_the_past():
    seats, (a, b, c) = Seats(), map(request, range(3))
    assert seats.take([a, b, c], 4, 8) == ([a, b, c, None], False)
    for one in (a, b, c):
        one.computed += 8
    seats.keep([a, b, c, None], 8)
    assert seats.take([b, c], 4, 8) == ([None, b, c, None], True)  # the first has ended
    assert seats.take([c, b], 4, 8) == ([None, b, c, None], True)
    d = request(3)
    assert seats.take([b, c, d], 4, 8) == ([d, b, c, None], False)
    assert seats.take([b, c], 2, 8) == ([b, c], False)
    assert seats.take([b, c], 4, 16)[1] is False
    b.computed += 1
    assert seats.take([b, c], 4, 8)[1] is False
    b.computed, c.preemptions = 13, 1
    assert seats.take([b, c], 4, 8)[1] is False
    c.preemptions = 0
    assert seats.take([b, c], 4, 8)[1] is True
    seats.clear()
    assert seats.take([b, c], 4, 8)[1] is False


STEPS = st.lists(
    st.tuples(st.sets(st.integers(0, 5), min_size=1, max_size=4), st.sampled_from([4, 5]), st.booleans()), max_size=12
)


@settings(max_examples=200, deadline=None)
@given(STEPS)
def test_a_past_that_is_said_to_be_there_is_there(steps):
    """Against rows that are really filled: what lies in a row is whose past was put there last, and how much of it."""
    seats, rows, requests = Seats(), [None] * 5, [request(identity) for identity in range(6)]
    for chosen, size, is_decoded in steps:
        running = [requests[identity] for identity in sorted(chosen)]
        seated, is_there = seats.take(running, size, 8)
        assert sorted(one.id for one in seated if one) == sorted(chosen) and len(seated) == size
        lies = all(one is None or rows[row] == (one.id, one.computed) for row, one in enumerate(seated))
        assert lies or not is_there
        for row, one in enumerate(seated):
            one and setattr(one, "computed", one.computed + 8)
            rows[row] = (one.id, one.computed) if one else rows[row]
        seats.keep(seated, 8)
        if not is_decoded:  # something else computed a token of each
            for one in running:
                one.computed += 1
