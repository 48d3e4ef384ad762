"""Packing: documents as one stream of tokens, cut into records of fixed length that know their document borders."""

import functools

import numpy as np

# A long document is cut into records in pieces, so that only its tokens take memory.
_PUSHED = 1 << 20


class Packer:
    """Cuts a stream of documents into records of `length` targets.

    The stream is END doc END doc ... END. A record holds length + 1 tokens and shares one with its neighbour, so every
    token but the first is a target exactly once. END opens the segment of the document after it: it is the context of
    that document's first token, and the target after the last token of the one before.
    """

    def __init__(self, length, end_id, token_byte_lengths, dtype):
        self.length, self.end_id, self.dtype = length, end_id, dtype
        self.token_byte_lengths = token_byte_lengths
        self._tokens, self._segments, self._count, self._document = [], [], 0, 0

    def add(self, tokens):
        """Adds one document and yields the records that are full."""
        self._document += 1
        self._push(np.array([self.end_id]))
        for start in range(0, len(tokens), _PUSHED):
            self._push(tokens[start : start + _PUSHED])
            if self._count > self.length:
                yield from self._cut()

    def finish(self):
        """Yields the last records; the final one is padded with segment 0."""
        self._document += 1
        self._push(np.array([self.end_id]))
        if self._count > self.length:
            yield from self._cut()
        if self._count > 1:
            yield self._padded()

    def _push(self, tokens):
        self._tokens.append(tokens.astype(self.dtype))
        self._segments.append(np.full(len(tokens), self._document, np.int32))
        self._count += len(tokens)

    def _cut(self):
        tokens, segments = np.concatenate(self._tokens), np.concatenate(self._segments)
        start, step, size = 0, self.length, self.length + 1
        while len(tokens) - start >= size:
            yield self._record(tokens[start : start + size], segments[start : start + size])
            start += step
        self._tokens, self._segments, self._count = [tokens[start:]], [segments[start:]], len(tokens) - start

    def _padded(self):
        missing = self.length + 1 - self._count
        tokens = np.concatenate([*self._tokens, np.full(missing, self.end_id, self.dtype)])
        return self._record(tokens, np.concatenate([*self._segments, np.zeros(missing, np.int32)]))

    def _record(self, tokens, segments):
        # Segments are numbered from 1 within a record; 0 stays padding.
        is_real = segments > 0
        numbered = np.where(is_real, segments - segments[0] + 1, 0)
        target_bytes = int(self.token_byte_lengths[tokens[1:]][is_real[1:]].sum())
        return {"tokens": tokens, "segments": numbered.astype(segment_dtype(self.length)), "target_bytes": target_bytes}


class DocumentPacker:
    """Makes one record of each document of at most `length` tokens: END doc END, padded with segment 0.

    Differential privacy protects a record, so no other document may share it.
    """

    def __init__(self, length, end_id, token_byte_lengths, dtype):
        self._packer = functools.partial(Packer, length, end_id, token_byte_lengths, dtype)

    def add(self, tokens):
        """Yields the record of one document."""
        packer = self._packer()
        record, *_ = [*packer.add(tokens), *packer.finish()]  # a full one leaves no room for its second END
        yield record

    def finish(self):
        """Yields nothing: no document waits for another."""
        yield from ()


def segment_dtype(length):
    """Returns the dtype that numbers the segments of records of `length` targets: as many as tokens at most."""
    return np.dtype(np.uint16) if length < 2**16 - 1 else np.dtype(np.int32)


def expand(records):
    """Returns the arrays of a batch from stored records: tokens [B, L+1], segments [B, L+1], target_bytes [B].

    tokens, targets, segments, positions (since the segment's start within the record) int32 [B, L]; weights float32
    [B, L]: 1 where the target is real, 0 in padding.
    """
    tokens, segments = records["tokens"].astype(np.int32), records["segments"].astype(np.int32)
    inside = segments[:, :-1]
    index = np.arange(inside.shape[1], dtype=np.int32)
    is_start = np.ones(inside.shape, bool)
    is_start[:, 1:] = inside[:, 1:] != inside[:, :-1]
    starts = np.maximum.accumulate(np.where(is_start, index, 0), axis=1)
    return {
        "tokens": np.ascontiguousarray(tokens[:, :-1]),
        "targets": np.ascontiguousarray(tokens[:, 1:]),
        "segments": np.ascontiguousarray(inside),
        "positions": (index - starts).astype(np.int32),
        "weights": (segments[:, 1:] > 0).astype(np.float32),
        "target_bytes": records["target_bytes"].astype(np.int32),
    }
