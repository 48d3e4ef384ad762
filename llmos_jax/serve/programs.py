"""The engine's compiled programs: prefill a chunk, gather pages, decode several steps, verify drafts; a fixed set, counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llmos_jax.serve import cache
from llmos_jax.serve.sample import Sampler, sampling_arrays
from llmos_jax.serve.stages import Stages


class Programs:
    """Compiles what it is asked for once per shape; `count` is how many there are.

    rows: a dict of numpy arrays; `row_arrays` has their names and shapes. page_size: tokens of a page. reads_pages: a kernel
    reads the past where it lies, when tokens are decoded one by one.
    """

    def __init__(self, handle, family, config, vocab_size, end_ids, page_size, reads_pages=False):
        self.page_size = page_size
        self.handle, self.family, self.config, self.placement = handle, family, config, handle.placement
        self.vocab_size, self.end_ids, self.reads_pages = vocab_size, np.array(sorted(end_ids), np.int32), reads_pages
        self.stages = Stages(handle.placement, config)
        shardings = self.stages.split_shardings(handle.shardings["stack"]["blocks"])
        self.split = jax.jit(self.stages.split, out_shardings=shardings)
        self._compiled = {}

    @property
    def count(self):
        """How many programs were compiled."""
        return len(self._compiled)

    def run(self, kind, weights, held, rows, **static):
        """Runs "prefill", "gather", "gather_some", "decode" or "verify" and returns (outputs, held); what was held is used up.

        held: (pools, blocks). The blocks, which "gather" makes, "gather_some" adds to and "decode" goes on in, are None for all
        others, and where a kernel reads pages.
        """
        layout = layout_of(rows)
        key = (kind, layout, held[0][0][0].shape, tuple(sorted(static.items())))
        if key not in self._compiled:
            self._compiled[key] = self._compile(kind, weights, held, layout, static)
        # One array in place of twenty: each costs a transfer of its own (0.7 of 4.5 ms that a prefill took on an H200).
        packed = np.concatenate([rows[name].view(np.int32).ravel() for name, _, _ in layout])
        return self._compiled[key](weights, held, packed)

    def _compile(self, kind, weights, held, layout, static):
        def run(weights, held, packed):
            return getattr(self, f"_{kind}")(weights, held, _unpacked(packed, layout), **static)

        whole = self.placement.sharding()
        size = sum(int(np.prod(shape)) for _, shape, _ in layout)
        packed = jax.ShapeDtypeStruct((size,), np.int32, sharding=whole)
        # What goes in is NumPy's and what comes out is whole on every device: so it is with many processes, too.
        outputs = (whole, (cache.pool_sharding(self.stages), cache.block_sharding(self.stages)))
        return jax.jit(run, donate_argnums=(1,), out_shardings=outputs).lower(weights, held, packed).compile()

    def _past(self, pools, rows):
        end = rows["table"].shape[1] * self.page_size
        return self.stages.each(cache.gather, (0, None, None, None))(pools, rows["table"], rows["past"], end)

    def _gather(self, weights, held, rows):
        """Copies the pages of rows together, for decoding programs to go on from."""
        gather = self.stages.each(cache.gather_blocks, (0, None, None))
        return (), (held[0], gather(held[0], rows["pages"], rows["held"]))

    def _gather_some(self, weights, held, rows):
        """Does so for newcomers, beside blocks that are there."""
        gather = self.stages.each(cache.gather_some, (0, 0, None, None, None, None))
        return (), (held[0], gather(*held, rows["pages"], rows["held"], rows["missing"], rows["count"][0]))

    def _write(self, pools, recent, page_BL, past_B, count_B):
        write = self.stages.each(cache.write_tokens, (0, 0, None, None, None))
        return write(pools, recent, page_BL, past_B, count_B)

    def _sampler(self, model, rows):
        history = rows["history"]
        if "owner" in rows:  # of blocks, as their tokens lie in them
            row, index = rows["owner"][:, None], rows["first"][:, None] + jnp.arange(history.shape[1])
        else:
            row, index = jnp.arange(history.shape[0])[:, None], jnp.arange(history.shape[1])[None]
        padded = model.head_weight.shape[0]
        return Sampler(rows, (history, row, index), rows["prompt"], rows["length"], padded, self.vocab_size)

    def _positions(self, rows, start, length):
        """Returns (positions [B, L] of new tokens, the length of the row that each sees)."""
        positions_BL = rows["past"][:, None] + start + jnp.arange(length)
        # Beyond the context are only tokens that will be dropped; they must stay finite.
        positions_BL = jnp.minimum(positions_BL, self.config.context - 1)
        return positions_BL, jnp.maximum(rows["prompt"][:, None], positions_BL + 1)

    def _rotations(self, model, rows, positions_BL, longest_BL):
        """Returns the model's rotations, computed once: XLA:CPU fuses sines and cosines into every head that they turn."""
        compute = functools.partial(model.rotations, positions_BL, longest_BL)
        if self.placement.platform != "cpu":
            return compute()
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
        return lax.cond(jnp.any(rows["count"] > 0), compute, lambda: nothing)  # always so, but the compiler can't know

    def _logits(self, model, hidden_BLD):
        return self.placement.constrain(model.logits(hidden_BLD), None, None, None)

    def _prefill(self, weights, held, rows, has_past):
        """Computes a chunk of tokens of each row, and draws what follows its last one."""
        model, tokens_BL, pools = self.handle.merge(weights[0]), rows["tokens"], held[0]
        past = self._past(pools, rows) if has_past else [None] * len(pools)
        read = cache.read_chunk(rows["past"], pools[0][0].dtype, self.placement)
        positions_BL, longest_BL = self._positions(rows, 0, tokens_BL.shape[1])
        layers = self.stages.run(model.stack, weights[1], past, read, only_B=rows["count"] - 1)
        rotations = self._rotations(model, rows, positions_BL, longest_BL)
        last_B1D, recent = model.decode(tokens_BL, positions_BL, rotations, layers)
        sampler = self._sampler(model, rows)
        token_B, logprobs, _ = sampler.draw(self._logits(model, last_B1D)[:, 0], rows["index"], sampler.counts)
        pages_BP = _once_known(token_B[:, None], rows["pages"])
        pools = self.stages.each(cache.write_pages, (0, 0, None))(pools, recent, pages_BP)
        return jax.tree.map(lambda x: x[None], (token_B, logprobs)), (pools, None)

    def _decode(self, weights, held, rows, steps):
        """Draws up to `steps` tokens of each row, one after the other; ends early when no row needs more."""
        model, ends_E, is_anybodys_B = self.handle.merge(weights[0]), jnp.asarray(self.end_ids), rows["room"] > 0
        sampler, (pools, blocks) = self._sampler(model, rows), held

        def advance(state):
            step, token_B, is_active_B, (positions_B1, rotations), kept, counts, drawn = state
            if self.reads_pages:
                given = (rows["table"], rows["past"], step, is_anybodys_B, self.page_size)
                read = cache.read_pages(*given, self.placement)
            else:
                place_B = lax.dynamic_index_in_dim(rows["place"], step, 1, keepdims=False)
                read = cache.read_step(rows["owner"], rows["first"], place_B, rows["past"] + step)
            layers = self.stages.run(model.stack, weights[1], kept, read, is_updated=True)
            hidden_B1D, kept = model.decode(token_B[:, None], positions_B1, rotations, layers)
            logits_BV = self._logits(model, hidden_B1D)[:, 0]
            token_B, logprobs, counts = sampler.draw(logits_BV, rows["index"] + step, counts)
            drawn = jax.tree.map(lambda old, new: old.at[step].set(new), drawn, (token_B, logprobs))
            is_active_B &= (step + 1 < rows["room"]) & ~(token_B[:, None] == ends_E).any(-1)
            return step + 1, token_B, is_active_B, places(step + 1), kept, counts, drawn

        def places(step):
            # Carried, since XLA:CPU would compute sines and cosines in every layer that uses them.
            positions_B1, longest_B1 = self._positions(rows, step, 1)
            return positions_B1, model.rotations(positions_B1, longest_B1)

        kept = pools if self.reads_pages else blocks
        drawn = jax.eval_shape(lambda: sampler.draw(jnp.zeros(sampler.counts[0].shape), rows["index"], sampler.counts)[:2])
        drawn = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), drawn)
        state = (jnp.int32(0), rows["tokens"][:, 0], is_anybodys_B, places(0), kept, sampler.counts, drawn)
        state = lax.while_loop(lambda state: (state[0] < steps) & state[2].any(), advance, state)
        step, _, _, _, kept, _, drawn = state
        if self.reads_pages:
            return drawn, (kept, None)
        cut = self.stages.each(cache.cut, (0, None, None))
        recent = cut(kept, rows["place"], rows["past"][:, None] + jnp.arange(steps))
        return drawn, (self._write(pools, recent, rows["page"], rows["past"], jnp.where(is_anybodys_B, step, 0)), kept)

    def _verify(self, weights, held, rows):
        """Draws what follows each of a row's tokens, its last one and a draft of what comes then, in one pass."""
        model, tokens_BL, pools = self.handle.merge(weights[0]), rows["tokens"], held[0]
        past = self._past(pools, rows)
        read = cache.read_chunk(rows["past"], pools[0][0].dtype, self.placement)
        positions_BL, longest_BL = self._positions(rows, 0, tokens_BL.shape[1])
        layers = self.stages.run(model.stack, weights[1], past, read)
        rotations = self._rotations(model, rows, positions_BL, longest_BL)
        hidden_BLD, recent = model.decode(tokens_BL, positions_BL, rotations, layers)
        logits_BLV, sampler = self._logits(model, hidden_BLD), self._sampler(model, rows)

        def draw(counts, of_step):
            step, logits_BV, draft_B = of_step
            token_B, logprobs, _ = sampler.draw(logits_BV, rows["index"] + step, counts)
            return sampler.count(counts, draft_B), (token_B, logprobs)  # were the draft wrong, the rest is dropped

        steps_L, drafts_LB = jnp.arange(tokens_BL.shape[1]), jnp.roll(tokens_BL, -1, axis=1).T
        _, drawn = lax.scan(draw, sampler.counts, (steps_L, logits_BLV.swapaxes(0, 1), drafts_LB))
        page_BL = cache.pages_of(rows["table"], rows["past"], tokens_BL.shape[1], self.page_size)
        count_B = _once_known(drawn[0][-1], rows["count"])
        return drawn, (self._write(pools, recent, page_BL, rows["past"], count_B), None)


def _once_known(tokens, values):
    """Returns `values`, as something that depends on drawn tokens, and by them on all that was read of the past.

    What is written to the pools at such places is written after they were read. Where nothing says so, XLA copies them first.
    """
    return jnp.where(tokens >= 0, values, 0)


def layout_of(rows):
    """Returns (name, shape, dtype) of each of a program's row arrays, in the order in which they are laid end to end."""
    return tuple((name, x.shape, x.dtype.str) for name, x in sorted(rows.items()))


def _unpacked(packed, layout):
    """Returns {name: array} of what was laid end to end, as `layout_of` says; all have 32 bits an element."""
    rows, start = {}, 0
    for name, shape, dtype in layout:
        stop = start + int(np.prod(shape))
        rows[name] = lax.bitcast_convert_type(packed[start:stop].reshape(shape), np.dtype(dtype))
        start = stop
    return rows


def row_arrays(requests, size, length, pages=0, history=0):
    """Returns {name: numpy array} of `size` rows, of which the first are `requests` (None: nobody): what programs read of them.

    tokens [B, length] (the last one known; to be filled in where it is several), table [B, pages], history [B, history], past
    (tokens that lie in pages), count (new tokens), room (tokens that may still be drawn; 0: nobody's row), prompt and length
    (of the history), index (of the next token in its continuation), and those of the sampler. All have 32 bits an element.
    """
    rows = sampling_arrays([r and (r.payload.sampling, r.payload.stream) for r in requests], size)
    for name in ("past", "count", "room", "prompt", "length", "index"):
        rows[name] = np.zeros(size, np.int32)
    rows["count"][:] = 1
    rows["tokens"], rows["table"] = np.zeros((size, length), np.int32), np.zeros((size, pages), np.int32)
    rows["history"] = np.zeros((size, history), np.int32)
    for row, request in ((row, request) for row, request in enumerate(requests) if request is not None):
        rows["tokens"][row, 0] = request.tokens[-1]
        rows["past"][row], rows["room"][row] = request.computed, request.limit - len(request.tokens)
        rows["prompt"][row], rows["length"][row] = request.prompt_length, len(request.tokens)
        rows["index"][row] = request.generated
        held = request.pages[:pages]
        rows["table"][row, : len(held)] = held
        if request.payload.is_penalised:  # a chunk that is not a prompt's last draws nothing that is kept: it may be cut
            known = request.tokens[:history]
            rows["history"][row, : len(known)] = known
    return rows


def block_arrays(seating, page_size, steps):
    """Returns what decoding programs read of a `seats.Seating`'s blocks, and what gathers them: {name: numpy array}, twice.

    owner (the row), first (position of its first token), history (tokens, where they are asked for) of each block; place and
    page [B, steps]: the block, and the page, of each new token (out of range and 0: nobody's). pages and held: of each block.
    """
    per_block = cache.pages_of_block(page_size)
    rows, count, width = len(seating.requests), seating.count, per_block * page_size
    arrays = {"owner": np.zeros(count, np.int32), "first": np.full(count, cache.NOBODYS, np.int32)}
    arrays["history"] = np.zeros((count, width), np.int32)
    arrays["place"], arrays["page"] = np.full((rows, steps), count, np.int32), np.zeros((rows, steps), np.int32)
    gathered = {"pages": np.zeros((count, per_block), np.int32), "held": np.zeros(count, np.int32)}
    for row, (request, blocks) in enumerate(zip(seating.requests, seating.blocks, strict=True)):
        if request is None:
            continue
        for number, block in enumerate(blocks):
            first = number * width
            arrays["owner"][block], arrays["first"][block] = row, first
            held = request.pages[number * per_block : (number + 1) * per_block]
            gathered["pages"][block, : len(held)] = held
            gathered["held"][block] = min(max(request.computed - first, 0), width)
            if request.payload.is_penalised:
                known = request.tokens[first : first + width]
                arrays["history"][block, : len(known)] = known
        for step in range(steps):
            position = request.computed + step
            if position // width < len(blocks):
                arrays["place"][row, step] = blocks[position // width]
            if position // page_size < len(request.pages):
                arrays["page"][row, step] = request.pages[position // page_size]
    return arrays, gathered
