"""Which requests run, on which pages, and what is computed next. Pure Python: decisions depend on what was submitted only.

A request waits, runs, and is finished. Running, it is first prefilled in chunks (all tokens but those whose keys and values
lie in pages), then decoded. A step prefills a bounded number of tokens, then decodes every row that is ready. While others
wait, some steps only prefill (decoding few costs nearly as much as decoding many): how many is bounded, too, so neither kind
of work keeps the other waiting for long. When pages run out the latest request gives up its own and goes back to the front of
the queue; what it had computed stays in the prefix cache as long as there is room.
"""

import collections
import dataclasses
import itertools
import typing

from llmos_jax.errors import ConfigError
from llmos_jax.serve.pages import page_digest

# Rows that are ready are decoded once so many times `prefill_tokens` are used up (a chunk may exceed the last of them).
_MOST_BUDGETS = 8

WAITING, RUNNING, FINISHED = "waiting", "running", "finished"


@dataclasses.dataclass(eq=False)
class Request:
    """A row of tokens that grows.

    tokens: the prompt, then what was generated. limit: most tokens, prompt included. computed: the first so many tokens have
    their keys and values in `pages`. salt: only requests with the same one share pages. reason: why it ended.
    """

    id: int
    tokens: list
    limit: int
    salt: bytes = b""
    payload: typing.Any = None
    prompt_length: int = 0
    state: str = WAITING
    reason: str = ""
    pages: list = dataclasses.field(default_factory=list)
    digests: list = dataclasses.field(default_factory=list)
    computed: int = 0
    reused: int = 0
    preemptions: int = 0

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def is_ready(self):
        """Only the last token is still to be computed: the row can be decoded."""
        return self.state == RUNNING and self.computed == len(self.tokens) - 1

    @property
    def generated(self):
        """How many tokens were generated."""
        return len(self.tokens) - self.prompt_length


class Scheduler:
    """Admits, prefills, decodes and preempts requests; `rows` run at most.

    prefill_tokens: most tokens of a chunk. A step begins chunks until it has given out as many.
    """

    def __init__(self, pool, rows, prefill_tokens):
        if prefill_tokens < pool.page_size:
            raise ConfigError(f"prefill_tokens={prefill_tokens} is less than a page of {pool.page_size} tokens.")
        self.pool, self.rows, self.prefill_tokens = pool, rows, prefill_tokens
        self.waiting, self.running = collections.deque(), []
        self._requests, self._budget, self._prefilled = {}, 0, 0  # the last: tokens since rows were decoded
        self._planned = {}  # id of a request whose chunk was given out -> digests of the pages that it will fill

    def __len__(self):
        return len(self._requests)

    def submit(self, request):
        """Queues a request; ConfigError when its pages would not fit into an empty pool, or its id is taken."""
        if request.id in self._requests:
            raise ConfigError(f"there is a request {request.id} already.")
        if request.prompt_length < 1 or request.limit <= request.prompt_length:
            raise ConfigError(
                f"request {request.id} has {request.prompt_length} tokens of at most {request.limit}: give it at least one, "
                "and room for another."
            )
        need = self.pool.pages_for(request.limit - 1)  # the last token is never read
        if need > self.pool.pages:
            raise ConfigError(
                f"a prompt of {request.prompt_length} tokens and its continuation, {request.limit} tokens in all, need {need} "
                f"pages of the cache, which has {self.pool.pages}: lower max_tokens, or raise the engine's cache_bytes."
            )
        self._requests[request.id] = request
        self.waiting.append(request)

    def begin_step(self):
        """Starts a step: its budget of prefilled tokens is whole."""
        self._budget = self.prefill_tokens
        self._planned.clear()

    def is_decoding_due(self):
        """Returns whether this step decodes the rows that are ready, once nothing more is prefilled in it.

        Not yet, when the budget is used up while a chunk would make the next in line ready: up to so many budgets go to these.
        """
        line = itertools.chain(
            (request for request in self.running if not request.is_ready),
            itertools.islice(self.waiting, max(self.rows - len(self.running), 0)),
        )
        following = next(line, None)
        self._prefilled += self.prefill_tokens - self._budget
        is_short = following is not None and len(following.tokens) - following.computed <= self.prefill_tokens
        if is_short and self._budget <= 0 and self._prefilled < self.prefill_tokens * _MOST_BUDGETS:
            return False
        self._prefilled = 0
        return True

    def next_chunk(self):
        """Returns (request, start, stop): the tokens to prefill next, or None: the budget is used up, or nobody can be now.

        Chunks begin on a page's border; what fits into one is not cut, and may exceed the budget. Several can be asked for
        before the first is computed (`advance` says that it was). A request looks for pages that it can share when its turn
        comes, so it finds what was computed a moment before; while chunks that were given out fill pages that it could share,
        there is none for it.
        """
        if self._budget <= 0:
            return None
        request = next((r for r in self.running if not r.is_ready and r.id not in self._planned), None)
        while request is None:
            if not self._admit():
                return None
            request = None if self.running[-1].is_ready else self.running[-1]
        start, left = request.computed, len(request.tokens) - request.computed
        size = left if left <= self.prefill_tokens else self.prefill_tokens - self.prefill_tokens % self.pool.page_size
        self._budget -= size
        self._extend_digests(request, start + size)
        self._planned[request.id] = set(request.digests[start // self.pool.page_size : (start + size) // self.pool.page_size])
        return request, start, start + size

    def decodable(self, tokens):
        """Returns the rows to decode, with pages for `tokens` more each (or as many as they may still grow).

        Where pages run out the latest request is preempted; the earliest always goes on.
        """
        for request in list(self.running):
            if request.is_ready and request.state == RUNNING:
                self._grow(request, tokens)
        return [request for request in self.running if request.is_ready]

    def advance(self, request, computed, new_tokens=()):
        """Notes what a program did: the first `computed` tokens lie in pages, and `new_tokens` were generated."""
        self._planned.pop(request.id, None)
        request.tokens.extend(new_tokens)
        filled = slice(request.computed // self.pool.page_size, computed // self.pool.page_size)
        request.computed = computed
        self._extend_digests(request, computed)
        # Pages are remembered as soon as they are full: before a request ends, others can share them.
        for page, digest in zip(request.pages[filled], request.digests[filled], strict=True):
            self.pool.remember(page, digest)

    def finish(self, request, reason):
        """Ends a request, whatever its state, and gives its pages back."""
        if request.state == FINISHED:
            return
        self._leave(request)
        request.state, request.reason = FINISHED, reason
        del self._requests[request.id]

    def find(self, identity):
        """Returns the unfinished request of this id, or None."""
        return self._requests.get(identity)

    def _admit(self):
        """Lets the first of the queue run, if there is a row and there are pages for all its tokens."""
        if not self.waiting or len(self.running) >= self.rows:
            return False
        request, pool = self.waiting[0], self.pool
        # At least the last token has to be computed: something must tell what comes next.
        self._extend_digests(request, len(request.tokens) - 1)
        sharable = request.digests[: (len(request.tokens) - 1) // pool.page_size]
        if any(not coming.isdisjoint(sharable) for coming in self._planned.values()):
            return False
        shared = pool.share(sharable)
        # A page for each row that runs: or the newcomer would soon take what they need to grow, and be preempted.
        need = pool.pages_for(len(request.tokens)) - len(shared)
        reserve = len(self.running)
        own = pool.allocate(need) if need + reserve <= pool.available else None
        if own is None:
            pool.release(shared)
            return False
        self.waiting.popleft()
        request.pages, request.computed = shared + own, len(shared) * pool.page_size
        request.reused += request.computed
        request.state = RUNNING
        self.running.append(request)
        return True

    def _grow(self, request, tokens):
        need = self.pool.pages_for(min(request.computed + tokens, request.limit - 1)) - len(request.pages)
        while need > 0:
            pages = self.pool.allocate(need)
            if pages is not None:
                request.pages += pages
                return
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return

    def _preempt(self, request):
        self._leave(request)
        request.state = WAITING
        request.preemptions += 1
        self.waiting.appendleft(request)

    def _leave(self, request):
        """Takes a request from queue or rows; every page that was ever held comes back through here."""
        (self.running if request.state == RUNNING else self.waiting).remove(request)
        pages, request.pages, request.computed = request.pages, [], 0
        self.pool.release(pages)

    def _extend_digests(self, request, tokens):
        size = self.pool.page_size
        for index in range(len(request.digests), tokens // size):
            parent = request.digests[-1] if request.digests else request.salt
            request.digests.append(page_digest(parent, request.tokens[index * size : (index + 1) * size]))
