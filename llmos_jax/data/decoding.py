"""From tokens back to text: bytes of tokens, and characters as their bytes arrive."""

import codecs
import hashlib
import json


class StreamDecoder:
    """Text from tokens one by one; a character whose bytes are not all there yet is held back."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token):
        """Returns the text that this token completes, maybe empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(int(token)))

    def flush(self):
        """Returns what was held back, incomplete characters as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet():
    """GPT-2's table: every byte as a printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table, extra = {}, 0
    for byte in range(256):
        if byte in printable:
            table[chr(byte)] = byte
        else:
            table[chr(256 + extra)] = byte
            extra += 1
    return table


# GPT-2's printable character of each byte.
BYTES = _byte_alphabet()


def token_bytes(token):
    """Returns the bytes that a token of byte-level BPE stands for."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode("utf-8")  # an added token is spelled as itself


def decode(tokenizer, tokens):
    """Returns the text of tokens; bytes that are not UTF-8 become U+FFFD."""
    return b"".join(tokenizer.token_bytes(int(token)) for token in tokens).decode("utf-8", errors="replace")


def digest(tree):
    """Returns 16 hex digits that identify the content of a JSON-able tree."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
