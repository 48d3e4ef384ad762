"""Drafts from a row's own history: what followed the last tokens when they occurred before (Saxena 2023, prompt lookup)."""

# How many last tokens are looked for, the longest first.
_SIZES = (4, 3, 2)
# A row whose drafts fail waits for twice as many dispatches each time, up to this many, before it drafts again.
_LONGEST_PAUSE = 32


class Drafter:
    """Proposes the tokens that may come next in a row. Depends on the row alone, never on time or on other rows."""

    def __init__(self):
        self._follows, self._indexed = {}, 1
        self._pause, self._failures = 0, 0
        self.proposed, self.accepted = 0, 0

    def propose(self, tokens, count):
        """Returns up to `count` tokens, maybe none; a repetition is taken to go on."""
        self._index(tokens)
        if self._pause:
            self._pause -= 1
            return []
        for size in _SIZES:
            start = self._follows.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if start is not None:
                draft = list(tokens[start : start + count])
                while len(draft) < count:
                    draft.append(draft[len(draft) - (len(tokens) - start)])
                return draft
        return []

    def report(self, proposed, accepted):
        """Notes how many of the proposed tokens were drawn."""
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + accepted
        self._failures = 0 if accepted else self._failures + 1
        self._pause = 0 if accepted else min(2 ** (self._failures - 1), _LONGEST_PAUSE)

    def _index(self, tokens):
        """Notes what followed: the latest occurrence counts, and the last tokens themselves are not one yet."""
        for end in range(self._indexed, len(tokens)):
            for size in _SIZES:
                if end >= size:
                    self._follows[tuple(tokens[end - size : end])] = end
        self._indexed = max(self._indexed, len(tokens))
