"""Pages and schedules, with no model: every row reads what it wrote, whatever is shared, preempted or cancelled meanwhile."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmos_jax.errors import ConfigError
from llmos_jax.serve.pages import PagePool, page_digest
from llmos_jax.serve.schedule import FINISHED, Request, Scheduler


def assert_adds_up(pool):
    counts = pool.counts()
    assert sum(counts.values()) == pool.pages and min(counts.values()) >= 0
    assert pool.available == counts["free"] + counts["cached"]


def chain(*pages):
    digests, parent = [], b""
    for tokens in pages:
        parent = page_digest(parent, tokens)
        digests.append(parent)
    return digests


def test_a_prefix_is_shared_and_the_deepest_page_goes_first():
    pool = PagePool(4, 2)
    first = pool.allocate(3)
    digests = chain([1, 2], [3, 4], [5, 6])
    for page, digest in zip(first, digests, strict=True):
        pool.remember(page, digest)
    assert pool.share(chain([1, 2], [3, 9])) == first[:1]
    pool.release(first)
    assert pool.counts() == {"free": 1, "held": 1, "cached": 2}
    pool.release(first[:1])
    assert pool.counts() == {"free": 1, "held": 0, "cached": 3}
    assert pool.allocate(5) is None and pool.counts()["free"] == 1
    taken = pool.allocate(2)  # the free one and the deepest
    assert pool.share(digests) == first[:2]
    pool.release(first[:2])
    pool.release(taken)
    pool.forget()
    assert pool.share(digests) == [] and pool.counts() == {"free": 4, "held": 0, "cached": 0}


def test_salt_and_everything_before_are_part_of_a_page():
    assert page_digest(b"", [1, 2]) != page_digest(b"a", [1, 2])
    assert chain([1, 2], [3, 4])[1] != chain([1, 5], [3, 4])[1]
    assert page_digest(b"", [1, 2]) == hashlib.blake2b(bytes([1, 0, 0, 0, 2, 0, 0, 0]), digest_size=16).digest()


def test_misuse_of_pages_is_an_error():
    pool = PagePool(2, 2)
    (page,) = pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match="released more often"):
        pool.release([page])
    with pytest.raises(ValueError, match="held by nobody"):
        pool.remember(page, b"x")
    with pytest.raises(ConfigError, match="a pool of 0 pages"):
        PagePool(0, 2)


def test_what_can_never_run_is_refused():
    scheduler = Scheduler(PagePool(4, 4), rows=2, prefill_tokens=8)
    scheduler.submit(Request(0, [1], limit=17))
    with pytest.raises(ConfigError, match="need 5 pages of the cache, which has 4"):
        scheduler.submit(Request(1, [1], limit=18))
    with pytest.raises(ConfigError, match="request 0 already"):
        scheduler.submit(Request(0, [1], limit=3))
    with pytest.raises(ConfigError, match="at least one, and room"):
        scheduler.submit(Request(2, [], limit=3))
    with pytest.raises(ConfigError, match="less than a page"):
        Scheduler(PagePool(4, 4), rows=2, prefill_tokens=3)


class Machine:
    """Runs what a scheduler decides on pages that hold tokens in place of keys and values."""

    def __init__(self, pages, page_size, rows, prefill_tokens, together=1):
        self.together = together  # chunks that are computed at once
        self.pool = PagePool(pages, page_size)
        self.scheduler = Scheduler(self.pool, rows, prefill_tokens)
        self.memory, self.done, self.waited = {}, {}, 0  # the last: tokens prefilled since rows were decoded

    def next_token(self, tokens):
        """A continuation that depends on all tokens before it."""
        return hashlib.blake2b(bytes(tokens), digest_size=1).digest()[0] % 7

    def write(self, request, start, tokens):
        for position, token in enumerate(tokens, start):
            page, offset = divmod(position, self.pool.page_size)
            if page < len(request.pages):  # else the padding page
                self.memory[request.pages[page], offset] = token

    def read(self, request, count):
        size = self.pool.page_size
        return [self.memory[request.pages[p // size], p % size] for p in range(count)]

    def step(self, steps):
        scheduler, prefilled = self.scheduler, 0
        scheduler.begin_step()
        while chunks := self.next_chunks():
            for request, start, stop in chunks:
                prefilled += stop - start
                assert start % self.pool.page_size == 0 and start == request.computed
                assert self.read(request, start) == request.tokens[:start]
            for request, start, stop in chunks:
                self.write(request, start, request.tokens[start:stop])
            for request, _, stop in chunks:
                new = [self.next_token(request.tokens)] if stop == len(request.tokens) else []
                scheduler.advance(request, stop, new)
                self.end(request)
        assert prefilled < 2 * scheduler.prefill_tokens
        if not scheduler.is_decoding_due():
            self.waited += prefilled
            assert prefilled >= scheduler.prefill_tokens and self.waited < 8 * scheduler.prefill_tokens
            return prefilled
        self.waited = 0
        rows = scheduler.decodable(steps)
        assert len(scheduler.running) <= scheduler.rows
        for request in rows:
            assert self.read(request, request.computed) == request.tokens[: request.computed]
            drawn, room = [], request.limit - len(request.tokens)
            for _ in range(steps):
                drawn.append(self.next_token(request.tokens + drawn))
            self.write(request, request.computed, [request.tokens[-1], *drawn[:-1]])  # also what is dropped below
            kept = drawn[:room]
            if 0 in kept:
                kept = kept[: kept.index(0) + 1]
            scheduler.advance(request, request.computed + len(kept), kept)
            self.end(request)
        return prefilled or len(rows)

    def next_chunks(self):
        chunks = []
        while len(chunks) < self.together and (chunk := self.scheduler.next_chunk()):
            chunks.append(chunk)
        return chunks

    def end(self, request):
        if len(request.tokens) == request.limit or (request.generated and request.tokens[-1] == 0):
            self.scheduler.finish(request, "length")
            self.done[request.id] = request

    def expected(self, prompt, limit):
        tokens = list(prompt)
        while len(tokens) < limit:
            tokens.append(self.next_token(tokens))
            if tokens[-1] == 0:
                break
        return tokens


@st.composite
def schedules(draw):
    size = draw(st.integers(1, 4))
    pages = draw(st.integers(2, 14))
    machine = dict(pages=pages, page_size=size, rows=draw(st.integers(1, 4)), together=draw(st.integers(1, 4)))
    machine["prefill_tokens"] = draw(st.integers(size, 4 * size + 3))
    room = pages * size + 1
    requests = []
    for _ in range(draw(st.integers(1, 8))):
        limit = draw(st.integers(2, room))
        prompt = draw(st.lists(st.integers(1, 2), min_size=1, max_size=limit - 1))
        requests.append((draw(st.integers(0, 6)), prompt, limit))  # step of arrival
    cancelled = draw(st.dictionaries(st.integers(0, 7), st.integers(0, 8), max_size=3))
    return machine, requests, cancelled, draw(st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_any_schedule_gives_every_request_its_own_continuation(schedule):
    sizes, requests, cancelled, steps = schedule
    machine = Machine(**sizes)
    submitted, stopped = {}, set()
    for number in range(10_000):
        for index, (arrival, prompt, limit) in enumerate(requests):
            if arrival == number:
                submitted[index] = Request(index, list(prompt), limit)
                machine.scheduler.submit(submitted[index])
        for index, when in cancelled.items():
            if when == number and index in submitted and submitted[index].state != FINISHED:
                machine.scheduler.finish(submitted[index], "cancelled")
                stopped.add(index)
        assert machine.step(steps) or not len(machine.scheduler), "nothing moves"
        assert_adds_up(machine.pool)
        if not len(machine.scheduler) and number > 6:
            break
    assert machine.pool.counts()["held"] == 0
    for index, (_, prompt, limit) in enumerate(requests):
        if index not in stopped:
            assert machine.done[index].tokens == machine.expected(prompt, limit)


def test_prefill_does_not_keep_decoding_waiting():
    """A long prompt beside a row that is ready: that is decoded after every chunk."""
    machine = Machine(pages=40, page_size=4, rows=4, prefill_tokens=8)
    machine.next_token = lambda tokens: 1
    machine.scheduler.submit(short := Request(0, [1, 2], limit=30))
    machine.step(1)
    machine.scheduler.submit(Request(1, list(range(1, 101)), limit=110))
    before = short.generated
    for _ in range(5):
        machine.step(1)
    assert short.generated == before + 5 and machine.scheduler.find(1).computed == 40


def test_who_waits_behind_a_long_prompt_does_not_keep_decoding_waiting():
    machine = Machine(pages=60, page_size=4, rows=4, prefill_tokens=8)
    machine.next_token = lambda tokens: 1
    machine.scheduler.submit(first := Request(0, [1, 2], limit=30))
    machine.step(1)
    machine.scheduler.submit(Request(1, list(range(1, 81)), limit=90))
    machine.scheduler.submit(Request(2, [3, 4], limit=30))
    before = first.generated
    for _ in range(8):  # then what is left is one chunk, and both others come first
        machine.step(1)
    assert first.generated == before + 8 and machine.scheduler.find(1).computed == 64


def test_those_who_wait_are_prefilled_first_for_a_bounded_time():
    """Ready rows after each step, and tokens of the first: it is decoded after eight budgets, then when nobody waits."""
    machine = Machine(pages=80, page_size=4, rows=12, prefill_tokens=8)
    machine.next_token = lambda tokens: 1
    machine.scheduler.submit(first := Request(0, [1, 2], limit=30))
    machine.step(1)
    for index in range(1, 12):
        machine.scheduler.submit(Request(index, [index] * 8, limit=30))
    seen = []
    for _ in range(12):
        machine.step(1)
        seen.append((sum(request.is_ready for request in machine.scheduler.running), first.generated))
    assert seen == [*((ready, 2) for ready in range(2, 9)), (9, 3), (10, 3), (11, 3), (12, 4), (12, 5)]


def test_who_could_share_what_is_being_computed_waits_for_it():
    machine = Machine(pages=40, page_size=2, rows=4, prefill_tokens=40, together=4)
    for index, prompt in enumerate([[1, 2, 3, 4, 5], [7, 8, 9], [1, 2, 3, 4, 6, 6], [1, 2, 3, 9]]):
        machine.scheduler.submit(Request(index, prompt, limit=12))
    machine.scheduler.begin_step()
    first = machine.next_chunks()
    assert [request.id for request, _, _ in first] == [0, 1] and machine.scheduler.next_chunk() is None
    for request, _, stop in first:
        machine.scheduler.advance(request, stop, [1])
    assert [(request.id, start) for request, start, _ in machine.next_chunks()] == [(2, 4), (3, 2)]


def test_the_latest_is_preempted_and_comes_back_to_its_pages():
    machine = Machine(pages=8, page_size=2, rows=2, prefill_tokens=8)
    machine.next_token = lambda tokens: len(tokens) % 5 + 1
    first, second = Request(0, [1, 2], limit=12), Request(1, [3, 4], limit=12)
    machine.scheduler.submit(first)
    machine.scheduler.submit(second)
    while len(machine.scheduler):
        machine.step(1)
    assert first.preemptions == 0 and second.preemptions > 0 and second.reused > 0
    assert second.tokens == [3, 4, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
