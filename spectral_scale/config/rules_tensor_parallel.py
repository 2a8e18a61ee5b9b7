"""What tensor parallelism asks of a model's shapes.

Pure arithmetic, so that a run is refused before any process group is made. No torch here.
"""

from collections.abc import Iterator

from spectral_scale.config.presets import Architecture


def tensor_parallel_problems(
    architecture: Architecture, tensor_parallel: int, *, world_size: int | None = None
) -> Iterator[str]:
    """Every size that `tensor_parallel` does not divide, and what to change."""
    tp = tensor_parallel
    if tp < 1:
        yield f"parallel.tensor_parallel={tp} must be at least 1"
        return
    if world_size is not None and world_size % tp:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        yield f"parallel.tensor_parallel={tp} must divide the {world_size} ranks; one of {divisors}"
    for what, size, remedy in _sharded_sizes(architecture):
        if size % tp:
            below, above = size - size % tp, size - size % tp + tp
            near = f"{below} or {above}" if below else str(above)
            yield (
                f"parallel.tensor_parallel={tp} does not divide the {size} {what}; "
                f"{remedy.format(near=near)}, or parallel.tensor_parallel to one of "
                f"{allowed_sizes(architecture, limit=max(tp, 8))}"
            )


def allowed_sizes(architecture: Architecture, *, limit: int) -> list[int]:
    """Numbers of tensor-parallel ranks, up to `limit`, that divide every size."""
    sizes = [size for _, size, _ in _sharded_sizes(architecture)]
    return [tp for tp in range(1, limit + 1) if not any(size % tp for size in sizes)]


def _sharded_sizes(architecture: Architecture) -> Iterator[tuple[str, int, str]]:
    """(what is sharded, its size, how the size could be changed)."""
    heads = "set the number of heads to {near}"
    yield "attention heads", architecture.num_heads, heads
    if architecture.num_kv_heads != architecture.num_heads:
        yield "key and value heads", architecture.num_kv_heads, heads
    yield "feed-forward features", architecture.ffn_size, "set model.ffn_size to {near}"
    yield (
        "rows of the vocabulary",
        architecture.vocab_size,
        "set model.vocab_size to {near} (not below the tokenizer's size)",
    )
