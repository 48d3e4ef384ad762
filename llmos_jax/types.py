"""Dimension letters: tensor names end in these, einsum strings use them, docstrings give shapes in them.

B batch rows, L length (positions of a row), M cache length, D embed (model width), F hidden (width of the MLP),
H query heads, G key-value heads, K size of one head, V vocabulary, E experts, N layers, T tokens (B x L, flattened),
C one chunk of tokens, J experts chosen for a token, S slots of the experts' input, R statistics of a router.
"""

DIMENSIONS = {
    "B": "batch", "L": "length", "M": "cache length", "D": "embed", "F": "hidden", "H": "query heads",
    "G": "key-value heads", "K": "head size", "V": "vocabulary", "E": "experts", "N": "layers", "T": "tokens", "C": "chunk",
    "J": "chosen experts", "S": "slots", "R": "router statistics",
}  # fmt: skip
