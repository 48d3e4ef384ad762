"""Pages of a key-value cache: who holds them, what they remember of earlier requests, which are given up first.

Pure bookkeeping: no array is touched. A page is held (by one request or several that share a prefix), cached (full, held by
nobody, kept because a later request may begin with the same tokens) or free; nothing else, at any time.
"""

import collections
import hashlib

import numpy as np

from llmos_jax.errors import ConfigError

# What is written beyond a row's pages goes here, and nobody reads it; it is not one of the pool's pages.
PADDING_PAGE = 0
_DIGEST_BYTES = 16


class PagePool:
    """`pages` pages, numbered from 1, of `page_size` tokens each; free + held + cached is always `pages`."""

    def __init__(self, pages, page_size):
        if pages < 1 or page_size < 1:
            raise ConfigError(f"a pool of {pages} pages of {page_size} tokens: both are at least 1.")
        self.pages, self.page_size = pages, page_size
        self._free = list(range(pages, 0, -1))
        self._holders = collections.Counter()
        self._cached = collections.OrderedDict()  # page -> None, the next to be given up first
        self._page_of, self._digest_of = {}, {}

    @property
    def available(self):
        """Pages that `allocate` can give: the free ones, and the cached ones it would make free."""
        return len(self._free) + len(self._cached)

    def counts(self):
        """Returns {"free", "held", "cached"}: pages in each state."""
        return {"free": len(self._free), "held": len(self._holders), "cached": len(self._cached)}

    def pages_for(self, tokens):
        """Returns how many pages hold so many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count):
        """Returns `count` pages with one holder each, or None (and nothing changes) when there are not so many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            taken.append(self._free.pop())
            self._holders[taken[-1]] = 1
        return taken

    def share(self, digests):
        """Returns the pages of the longest known prefix of a chain of digests, each with one holder more."""
        shared = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            self._cached.pop(page, None)
            self._holders[page] += 1
            shared.append(page)
        return shared

    def remember(self, page, digest):
        """Notes what a held, full page contains, so that it can be shared; the first page of a content is kept."""
        if page not in self._holders:
            raise ValueError(f"page {page} is held by nobody: what it contains can't be vouched for.")
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def release(self, pages):
        """Takes one holder from each of a request's pages, given from its first token on: the only way back.

        The deepest goes first into the order of eviction: a page is of no use without those before it.
        """
        for page in reversed(pages):
            if page not in self._holders:
                raise ValueError(f"page {page} is released more often than it was held.")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._digest_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def forget(self):
        """Drops what pages remember (the model's weights changed): cached pages become free, held ones are never shared."""
        self._page_of.clear()
        self._digest_of.clear()
        self._free += self._cached
        self._cached.clear()

    def _forget(self, page):
        del self._page_of[self._digest_of.pop(page)]


def page_digest(parent, tokens):
    """Returns 128 bits that identify a full page: its tokens and all before them (`parent`: the digest of the page before).

    The first page's parent is the salt of those who may share: b"" is everybody.
    """
    return hashlib.blake2b(parent + np.asarray(tokens, "<i4").tobytes(), digest_size=_DIGEST_BYTES).digest()
