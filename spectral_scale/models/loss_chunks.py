"""How many tokens' logits exist at a time; without torch, so that plans can import it."""

CHUNK_BYTES = 2**29
"""Bytes that a chunk's logits in float32 may take. Fewer would make the head's products thin, and
its weight's gradient would be read and written for each chunk."""


def chunk_rows(vocabulary: int) -> int:
    """The tokens whose logits are computed at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def chunk_sizes(tokens: int, vocabulary: int) -> list[int]:
    """Tokens of each chunk, as equal as can be; one chunk if all of them fit it."""
    chunks = max(1, -(-tokens // chunk_rows(vocabulary)))
    return [tokens // chunks + (i < tokens % chunks) for i in range(chunks)]
