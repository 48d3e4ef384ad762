"""The inference engine: requests in, tokens out; continuous batching over a paged cache, with prefix reuse and drafts.

`step` prefills a bounded number of prompt tokens, then, unless more should be prefilled first, decodes all rows that are ready:
several tokens each in one dispatch, or one pass over drafts where rows have some. What a request gets depends on its tokens and
its settings alone; neighbours, order, shared pages, preemption and drafts change only when it comes. Decisions use no clock, so
all processes of a run agree.
"""

import collections
import dataclasses

import jax
import numpy as np
from absl import logging

from llmos_jax.compute import memory
from llmos_jax.config import setting
from llmos_jax.errors import ConfigError
from llmos_jax.models.attention_paged import pages_refusal
from llmos_jax.serve import cache
from llmos_jax.serve.draft import Drafter
from llmos_jax.serve.pages import PagePool
from llmos_jax.serve.programs import Programs, block_arrays, row_arrays
from llmos_jax.serve.sample import SamplingConfig
from llmos_jax.serve.schedule import Request, Scheduler
from llmos_jax.serve.seats import Seating, Seats

# The fewest tokens of a row that have a program of their own.
_LEAST_CONTEXT, _LEAST_CHUNK, _LEAST_BLOCKS = 256, 32, 256 // cache.BLOCK
# To whoever's device runs out.
_ADVICE = (
    "give fewer prompts, lower cache_bytes, rows or prefill_tokens of the EngineConfig, or lay the weights over more devices "
    "(mesh.model, mesh.pipeline)"
)


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much runs at once, and in which pieces."""

    rows: int = setting(16, help="requests that are decoded together", at_least=1)
    page_size: int = setting(16, help="tokens of a page of the cache", at_least=1)
    cache_bytes: int = setting(2**28, help="of keys and values, all devices together; at least one whole context", at_least=1)
    prefill_tokens: int = setting(
        0,
        help="prompt tokens of a chunk, and between two decodings (to eight times as many while short prompts wait); "
        "0: 512 on a CPU, 4,096 on accelerators",
        at_least=0,
    )
    prefill_rows: int = setting(
        0, help="prompts computed in one dispatch, if they are short enough; 0: 1 on a CPU, 8 on accelerators", at_least=0
    )
    decode_steps: int = setting(8, help="tokens of each row drawn in one dispatch", at_least=1)
    decode_attention: str = setting(
        "auto",
        help="gathered: pages are copied together when rows change; paged: a kernel reads them where they lie (GPU, TPU)",
        choices=("auto", "gathered", "paged"),
    )
    draft_tokens: int = setting(6, help="tokens proposed from a row's own history and checked in one pass; 0: none", at_least=0)

    def __post_init__(self):
        if 0 < self.prefill_tokens < self.page_size:
            raise ConfigError(f"prefill_tokens={self.prefill_tokens} is less than a page of page_size={self.page_size} tokens.")

    def on(self, platform):
        """Returns these settings with those that go by the platform filled in."""
        tokens, rows = (512, 1) if platform == "cpu" else (4096, 8)
        tokens = self.prefill_tokens or max(tokens, self.page_size)
        return dataclasses.replace(self, prefill_tokens=tokens, prefill_rows=self.prefill_rows or rows)


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a request: its new `tokens` (without one that ends it), and `reason` when it has ended.

    reason: "end" (a token that ends), "length" (max_tokens), "context" (the model's), "cancelled" or "". logprobs: for each
    token (its own, {token: of the likeliest}), where asked for.
    """

    id: int
    tokens: tuple[int, ...]
    reason: str = ""
    logprobs: tuple = ()


@dataclasses.dataclass
class _Payload:
    sampling: SamplingConfig
    stream: int
    drafter: Drafter

    @property
    def is_penalised(self):
        s = self.sampling
        return (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)


class Engine:
    """Generates for many requests at once.

    handle: a `ModelHandle`; family: the model's module (`cache_shapes`); config: its Config. vocab_size: tokens from here on
    are never drawn. end_ids: tokens that end a continuation. `counts` adds up what was done.
    """

    def __init__(self, handle, family, config, params, *, vocab_size, end_ids=(), settings=None):
        self.settings, self.config = (settings or EngineConfig()).on(handle.placement.platform), config
        self.handle, self.family = handle, family
        self.vocab_size, self.end_ids = vocab_size, frozenset(end_ids)
        size, rows = self.settings.page_size, self.settings.rows
        self.dtype = handle.merge(params).dtype
        self.programs = Programs(handle, family, config, vocab_size, end_ids, size, self._reads_pages())
        whole = -(-config.context // size)
        affordable = self.settings.cache_bytes // cache.page_bytes(family, config, size, self.dtype)
        self.pool = PagePool(min(max(affordable, whole), rows * whole), size)
        self.scheduler = Scheduler(self.pool, self.settings.rows, self.settings.prefill_tokens)
        self.counts = collections.Counter()
        self._row_ladder = _row_ladder(rows)
        self._page_ladder = _ladder(self.pool.pages_for(_LEAST_CONTEXT), whole, 2)
        self._most_blocks = -(-whole // cache.pages_of_block(size))  # of a row
        chunk = min(self.pool.pages_for(self.settings.prefill_tokens), whole)
        is_cpu, least = handle.placement.platform == "cpu", self.pool.pages_for(_LEAST_CHUNK)
        self._chunk_ladder = self._whole_ladder = [pages * size for pages in _ladder(least, chunk, 2)]
        if is_cpu:
            # A CPU computes padding as slowly as tokens. Behind a past there are programs for each length of it, and fewer
            # chunks, but one more for the few tokens that a known prefix leaves of a prompt.
            self._chunk_ladder = [pages * size for pages in _ladder(self.pool.pages_for(_LEAST_CHUNK // 2), chunk, 2)]
            self._whole_ladder = [pages * size for pages in _fine_ladder(least, chunk, max(1, least // 2), parts=8)]
        self._next_id, self._weights, self._pools, self._blocks, self._events = 0, None, None, None, []
        self._seats = Seats(cache.pages_of_block(size) * size)
        self.load(params)

    def load(self, params):
        """Takes other weights; ConfigError while requests run. What pages remember is forgotten."""
        if len(self.scheduler):
            raise ConfigError(f"{len(self.scheduler)} requests still run: weights change between requests only.")
        self.release()
        with self._explained():
            self._weights = (params, self.programs.split(params["stack"]["blocks"]))
            given = self.family, self.config, self.pool.pages, self.settings.page_size, self.dtype, self.programs.stages
            self._pools = cache.init_pools(*given)

    def release(self):
        """Gives the memory of weights and cache back; `load` takes it again. Compiled programs are kept."""
        self._weights = self._pools = None
        self._forget_blocks()
        self.pool.forget()

    def submit(self, prompt, sampling, stream=0):
        """Queues a prompt's tokens and returns the request's id.

        stream: which of several continuations with the same seed. Raises ConfigError when the prompt does not fit the context,
        holds what is no token, or its pages could never fit into the cache.
        """
        prompt = [int(token) for token in prompt]
        if not 0 < len(prompt) <= self.config.context:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens; the model's context is {self.config.context}: give it at least one, and "
                "no more than that."
            )
        wrong = next((token for token in prompt if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise ConfigError(f"the prompt has the token {wrong}; the vocabulary has {self.vocab_size}.")
        sampling.check(self.vocab_size)
        # The last position that the model knows tells one token more, which it never reads.
        limit = min(len(prompt) + sampling.max_tokens, self.config.context + 1)
        payload = _Payload(sampling, stream, Drafter())
        request = Request(self._next_id, prompt, limit, salt=self._salt(len(prompt)), payload=payload)
        self.scheduler.submit(request)
        self._next_id += 1
        return request.id

    def cancel(self, identity, reason="cancelled"):
        """Ends a request; the next `step` says so. False when there is none of this id (any more)."""
        request = self.scheduler.find(identity)
        if request is None:
            return False
        self.scheduler.finish(request, reason)
        self._events.append(Event(identity, (), reason))
        if not len(self.scheduler):
            self._forget_blocks()
        return True

    def forget_events(self):
        """Drops the news of requests that were cancelled: for a caller who knows."""
        self._events = [event for event in self._events if event.reason != "cancelled"]

    def step(self):
        """Computes what is next and returns the Events so far; [] when nothing was drawn, or there is nothing to do.

        An exception loses none: the next call returns what was told before it.
        """
        self._advance(self._events)
        events, self._events = self._events, []
        return events

    def _advance(self, events):
        self._prefill_chunks(events)
        if not self.scheduler.is_decoding_due():
            return
        rows = self.scheduler.decodable(max(self.settings.decode_steps, self.settings.draft_tokens + 1))
        if rows:
            drafts = self._drafts(rows)
            self._decode(rows, events) if drafts is None else self._verify(rows, drafts, events)
        if not rows or not len(self.scheduler):
            self._forget_blocks()

    def stream(self, prompts, samplings):
        """Yields (index, Event) for every prompt until all have ended; those left are cancelled when the caller stops asking.

        samplings: one SamplingConfig, or one a prompt. Equal prompts draw from different streams: their indices.
        """
        samplings = [samplings] * len(prompts) if isinstance(samplings, SamplingConfig) else samplings
        index_of = {}
        try:
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                index_of[self.submit(prompt, sampling, stream=index)] = index
            yield from self._follow(index_of)
        finally:
            for identity in index_of:
                self.cancel(identity)
            self.forget_events()

    def _follow(self, index_of):
        left = set(index_of)
        while left:
            for event in self.step():
                if event.id not in left:
                    continue
                if event.reason:
                    left.discard(event.id)
                yield index_of[event.id], event

    def generate(self, prompts, samplings):
        """Returns (tokens, reason, logprobs) of every prompt's continuation."""
        tokens, logprobs, reasons = [[] for _ in prompts], [[] for _ in prompts], [""] * len(prompts)
        for index, event in self.stream(prompts, samplings):
            tokens[index] += event.tokens
            logprobs[index] += event.logprobs
            reasons[index] = event.reason
        return [(tuple(t), r, tuple(p)) for t, r, p in zip(tokens, reasons, logprobs, strict=True)]

    def warm_up(self):
        """Compiles every program that a request can need, and returns how many there are."""
        for rows in self._row_ladder:
            for count in self._block_ladder(rows) if not self.programs.reads_pages else ():
                for is_new in (True, False):  # as it begins, and with newcomers
                    self._run_decode(Seating((None,) * rows, ((),) * rows, count, (0,), is_new))
            for pages in self._page_ladder if self.programs.reads_pages else ():
                self._run_paged([], rows, pages)
            for pages in self._page_ladder if self.settings.draft_tokens else ():
                self._run("verify", self._arrays([], rows, self.settings.draft_tokens + 1, pages))
        shapes = [(length, 1, False) for length in self._whole_ladder]
        shapes += [(length, pages, True) for length in self._chunk_ladder for pages in self._page_ladder]
        for length, pages, has_past in shapes:
            for rows in {1, self._most_rows(length, pages, has_past)}:
                self._run("prefill", self._chunk_arrays([], rows, length, pages), has_past=has_past)
        self._forget_blocks()
        logging.info("%d programs compiled", self.programs.count)
        return self.programs.count

    def _reads_pages(self):
        """Returns whether decoding reads pages by the platform's kernel; ConfigError where it should and can't."""
        (_, _, _, head_size), _ = self.family.cache_shapes(self.config, 1, self.settings.page_size)
        entries = self.settings.rows * -(-self.config.context // self.settings.page_size)
        given = self.handle.placement, self.dtype, head_size, self.settings.page_size, self.config.windows, entries
        refusal = pages_refusal(*given)
        if self.settings.decode_attention == "paged" and refusal is not None:
            raise ConfigError(f"decode_attention=paged {refusal}; take 'gathered', or 'auto'.")
        return self.settings.decode_attention != "gathered" and refusal is None

    def _salt(self, prompt_length):
        """Returns what keeps rows apart that turn the same positions by different angles."""
        stretched = self.config.stretched_from
        return b"" if stretched is None else str(max(prompt_length, stretched)).encode()

    def _run(self, kind, rows, blocks=None, **static):
        with self._explained():
            drawn, (self._pools, blocks) = self.programs.run(kind, self._weights, (self._pools, blocks), rows, **static)
            self.counts[kind] += 1
            if drawn and (rows["logprobs"] < 0).all():
                drawn = (drawn[0], None)  # nobody asked for them: each array is a transfer
            return jax.device_get(drawn), blocks

    def _explained(self):
        """Says what takes the memory of a device that runs out in the block."""

        def parts():
            pools = self.pool.pages * cache.page_bytes(self.family, self.config, self.settings.page_size, self.dtype)
            return {"weights": memory.bytes_per_device(self._weights), "cache, all devices": pools}

        return memory.explained("while it generated", parts, _ADVICE)

    def _run_decode(self, seating):
        """Returns what a decoding program draws for a Seating."""
        steps = self.settings.decode_steps
        of_blocks, of_pages = block_arrays(seating, self.settings.page_size, steps)
        arrays = row_arrays(seating.requests, len(seating.requests), 1) | of_blocks
        blocks = None if seating.is_new else self._blocks  # the old ones make room first
        self._forget_blocks()  # they are used up, whatever happens
        if seating.is_new:
            blocks = self._run("gather", of_pages)[1]
        elif seating.missing:
            missing = [block for row in seating.missing for block in seating.blocks[row]]
            of_pages["missing"], of_pages["count"] = np.zeros(seating.count, np.int32), np.full(1, len(missing), np.int32)
            of_pages["missing"][: len(missing)] = missing
            blocks = self._run("gather_some", of_pages, blocks)[1]
        drawn, self._blocks = self._run("decode", arrays, blocks, steps=steps)
        return drawn

    def _run_paged(self, requests, rows, pages):
        """Returns what a decoding program that reads pages where they lie draws; the first rows are `requests`."""
        return self._run("decode", self._arrays(requests, rows, 1, pages), steps=self.settings.decode_steps)[0]

    def _forget_blocks(self):
        self._blocks = None
        self._seats.clear()

    def _arrays(self, requests, rows, length, pages):
        return row_arrays(requests, rows, length, pages, pages * self.pool.page_size)

    def _chunk_arrays(self, chunks, rows, length, pages):
        size = self.pool.page_size
        arrays = self._arrays([request for request, _, _ in chunks], rows, length, pages)
        arrays["pages"] = np.zeros((rows, length // size), np.int32)
        for row, (request, start, stop) in enumerate(chunks):
            arrays["tokens"][row, : stop - start], arrays["count"][row] = request.tokens[start:stop], stop - start
            written = request.pages[start // size : -(-stop // size)]
            arrays["pages"][row, : len(written)] = written
        return arrays

    def _prefill_chunks(self, events):
        """Computes what the scheduler lets this step prefill, chunks that are alike in one dispatch."""
        self.scheduler.begin_step()
        while True:
            alike = collections.defaultdict(list)
            while chunk := self.scheduler.next_chunk():
                alike[self._prefill_shape(*chunk)].append(chunk)
            if not alike:
                return  # else there may be one more, for a request that waited for pages that are filled now
            for shape, chunks in alike.items():
                most = self._most_rows(*shape)
                while chunks:
                    # Few are faster one by one than with as many of nobody's.
                    together = most if 2 * len(chunks) >= most else 1
                    self._prefill(chunks[:together], *shape, events)
                    chunks = chunks[together:]

    def _prefill_shape(self, request, start, stop):
        """Returns (length, pages of the past, whether there is one) of the program for a chunk."""
        needs_history = request.payload.is_penalised and stop == len(request.tokens)
        has_past = start > 0 or needs_history  # history follows the pages
        ladder = self._chunk_ladder if has_past else self._whole_ladder
        length = next(length for length in ladder if length >= stop - start)
        return length, self._pages_for(stop if needs_history else start) if has_past else 1, has_past

    def _most_rows(self, length, pages, has_past):
        """Returns how many chunks of a shape one dispatch computes: it is made for one, and for so many."""
        tokens = length + (pages * self.pool.page_size if has_past else 0)  # each row's past is gathered, too
        return max(1, min(self.settings.prefill_rows, self.settings.rows, self.settings.prefill_tokens // tokens))

    def _prefill(self, chunks, length, pages, has_past, events):
        rows = 1 if len(chunks) == 1 else self._most_rows(length, pages, has_past)
        arrays = self._chunk_arrays(chunks, rows, length, pages)
        (tokens, logprobs), _ = self._run("prefill", arrays, has_past=has_past)
        for row, (request, start, stop) in enumerate(chunks):
            self.counts["prefilled_tokens"] += stop - start
            if stop < len(request.tokens):
                self.scheduler.advance(request, stop)
            else:
                of_row = tokens[:, row], jax.tree.map(lambda x, row=row: x[:, row], logprobs)
                self._accept(request, *of_row, events, computed=stop)

    def _drafts(self, rows):
        """Returns a draft for each row, or None where decoding step by step promises more."""
        if not self.settings.draft_tokens:
            return None
        drafts = []
        for request in rows:
            room = min(request.limit - len(request.tokens) - 1, self.settings.draft_tokens)
            drafts.append(request.payload.drafter.propose(request.tokens, room) if room > 0 else [])
        return drafts if sum(map(len, drafts)) >= len(rows) else None

    def _decode(self, requests, events):
        steps = self.settings.decode_steps
        rows = self._rows_for(requests)
        if self.programs.reads_pages:
            pages = self._pages_for(max(request.computed for request in requests) + steps)
            seated, (tokens, logprobs) = requests, self._run_paged(requests, rows, pages)
        else:
            seating = self._seats.take(requests, rows, steps, self._block_ladder(rows))
            seated, (tokens, logprobs) = seating.requests, self._run_decode(seating)
        row_of = {request.id: row for row, request in enumerate(seated) if request}
        for request in requests:
            row = row_of[request.id]
            self._accept(request, tokens[:, row], jax.tree.map(lambda x, row=row: x[:, row], logprobs), events)
        if not self.programs.reads_pages:
            self._seats.keep(seating)

    def _verify(self, requests, drafts, events):
        self._forget_blocks()  # it will lack what is accepted here
        length = self.settings.draft_tokens + 1
        pages = self._pages_for(max(r.computed for r in requests) + length)
        rows = self._arrays(requests, self._rows_for(requests), length, pages)
        for row, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            rows["tokens"][row, : 1 + len(draft)] = [request.tokens[-1], *draft]
            rows["count"][row] = 1 + len(draft)
        (tokens, logprobs), _ = self._run("verify", rows)
        for row, (request, draft) in enumerate(zip(requests, drafts, strict=True)):
            right = 0
            while right < len(draft) and tokens[right, row] == draft[right]:
                right += 1
            if draft:
                request.payload.drafter.report(len(draft), right)
                self.counts["drafted_tokens"] += len(draft)
                self.counts["accepted_tokens"] += right
            drawn = jax.tree.map(lambda x, row=row: x[:, row], logprobs)
            self._accept(request, tokens[: right + 1, row], drawn, events)

    def _accept(self, request, drawn, logprobs, events, computed=None):
        """Takes the drawn tokens of a request up to the one that ends it; what follows is dropped."""
        kept, reason, sampling = [], "", request.payload.sampling
        for token in map(int, drawn):
            kept.append(token)
            if token in self.end_ids:
                reason = "end"
            elif request.generated + len(kept) >= sampling.max_tokens:
                reason = "length"
            elif len(request.tokens) + len(kept) >= request.limit:
                reason = "context"
            if reason:
                break
        self.counts["generated_tokens"] += len(kept)
        self.scheduler.advance(request, request.computed + len(kept) if computed is None else computed, kept)
        shown = tuple(kept[:-1] if reason == "end" else kept)
        events.append(Event(request.id, shown, reason, _logprobs(sampling.logprobs, shown, logprobs)))
        if reason:
            self.counts["reused_tokens"] += request.reused
            self.counts["preemptions"] += request.preemptions
            self.scheduler.finish(request, reason)

    def _rows_for(self, requests):
        return next(rows for rows in self._row_ladder if rows >= len(requests))

    def _block_ladder(self, rows):
        """Returns how many blocks decoding programs of so many rows have: what others have, too, so that blocks are kept."""
        least = min(_LEAST_BLOCKS, self._most_blocks)
        ladder = _fine_ladder(least, self.settings.rows * self._most_blocks, 2)
        most = next(count for count in ladder if count >= rows * self._most_blocks)
        return [count for count in ladder if rows * least <= count <= most]

    def _pages_for(self, tokens):
        pages = self.pool.pages_for(tokens)
        return next((step for step in self._page_ladder if step >= pages), self._page_ladder[-1])


def _ladder(least, most, factor):
    """Returns rising sizes from `least` to `most`: what is in between takes the next one."""
    sizes = [min(least, most)]
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] * factor, most))
    return sizes


def _row_ladder(most):
    """Returns numbers of rows that have programs: 1, 2, 4, 8, 12, 16, 24, 32, ... to `most`.

    A row of nobody costs as much as any other, above all where a CPU computes it.
    """
    sizes = [min(size, most) for power in range(most.bit_length() + 1) for size in (2**power, 3 * 2**power // 2)]
    return sorted({size for size in sizes if size not in (3, 6) or size == most})


def _fine_ladder(least, most, step, parts=4):
    """Returns rising sizes from `least` to `most`, one of `parts` of the last power of two (times `least`) apart, or `step`.

    Decoding waits for what it reads of the cache, above all where contexts are long: a quarter too much is enough.
    """
    sizes, octave = [min(least, most)], least
    while sizes[-1] < most:
        octave *= 2 if sizes[-1] >= 2 * octave else 1
        sizes.append(min(sizes[-1] + max(octave // parts, step), most))
    return sizes


def _logprobs(alternatives, tokens, logprobs):
    """Returns what an Event says of the first `tokens`' log-probabilities."""
    if alternatives is None:
        return ()
    found = []
    for step in range(len(tokens)):
        top = zip(logprobs["top_tokens"][step, :alternatives], logprobs["top"][step, :alternatives], strict=True)
        found.append((float(logprobs["chosen"][step]), {int(token): float(value) for token, value in top}))
    return tuple(found)
