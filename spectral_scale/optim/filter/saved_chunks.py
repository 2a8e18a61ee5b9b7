"""Reads a filter's state back from the chunks that it saved."""

from torch import Tensor

from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.shard_geometry import Rectangle


class SavedChunks:
    """Finds the chunk that was saved under a name and place.

    Args:
        saved: tensors by `TensorChunk.key`.
    """

    def __init__(self, saved: dict[str, Tensor]) -> None:
        self._saved = saved

    def read(
        self, name: str, offset: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        """The saved rectangle, or all of a tensor. Raises CheckpointError if it is missing."""
        for key in (name, f"{name}@{','.join(map(str, offset or ()))}"):
            found = self._saved.get(key)
            if found is not None and offset is not None and shape is not None:
                box, start = Rectangle(offset, shape), (0,) * len(offset)
                frame = Rectangle(start if key == name else offset, tuple(found.shape))
                found = found[box.slices_in(frame)]
            if found is not None and (shape is None or tuple(found.shape) == tuple(shape)):
                return found
        raise CheckpointError(
            f"{name} is missing from the filter's state; load it with the filter, model and number "
            "of ranks that saved it"
        )
