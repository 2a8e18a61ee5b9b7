"""Owners build values and scatter them into every rank's layers, bucket by bucket.

All owners build one bucket at the same time; then all ranks agree that none of them failed, and the
buckets are sent one after another. So no rank holds more than its own bucket and the one that
arrives, and none waits in a collective that another will never enter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from spectral_scale.errors import SpectralError
from spectral_scale.methods.buckets import Bucket, plan_rounds, scattered_bytes, scattered_leaves
from spectral_scale.methods.layer import FactoredLinear
from spectral_scale.methods.phases import OwnerWork, PhaseClock
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Scatters what owners build. All methods are collective."""

    layers: Mapping[str, FactoredLinear]
    """Converted layers by name."""
    owners: Mapping[str, int]
    """Layer -> the rank that builds its values."""
    store: ParameterStore
    """Access to the parameters, however the backend shards them."""
    collective: Collective
    """All ranks that train the model."""
    clock: PhaseClock
    """Times the phases rebuild, agree and deliver."""

    def scatter(self, build: Callable[[str, bool], dict[str, Tensor]], *, trained: bool) -> None:
        """Scatter frozen values, and trained ones if `trained`. Raises SpectralError on all ranks.

        Args:
            build: (layer, trained) -> its values by leaf; called on the owner only. Frozen ones are
                sent in the dtype of the layer's parameter.
            trained: whether factors are sent, too.
        """
        sizes = {name: scattered_bytes(layer) for name, layer in self.layers.items()}
        for buckets in plan_rounds(self.owners, sizes):
            work = OwnerWork()
            built: dict[str, Tensor] = {}
            for name in (n for b in buckets if b.owner == self.collective.rank for n in b.names):
                if work.problem is not None:
                    break
                with self.clock.phase("rebuild"), work.on(name):
                    built |= {f"{name}.{k}": v for k, v in build(name, trained).items()}
            self.agree(work.problem, "rebuild")
            for bucket in buckets:
                with self.clock.phase("deliver"):
                    self._send(bucket, built, trained)

    def agree(self, problem: str | None, what: str) -> None:
        """Raise SpectralError on all ranks alike if any of them has a problem."""
        with self.clock.phase("agree"):
            agreed = self.collective.agree(problem, what=what)
        if agreed is not None:
            raise SpectralError(agreed)

    def _send(self, bucket: Bucket, built: Mapping[str, Tensor], trained: bool) -> None:
        mine = bucket.owner == self.collective.rank
        fqns = [
            f"{name}.{leaf}"
            for name in bucket.names
            for leaf in scattered_leaves(self.layers[name], trained=trained)
        ]
        values = {fqn: built[fqn] if mine else None for fqn in fqns}
        self.store.scatter(values, owner=bucket.owner)
        for name in bucket.names:
            self.layers[name].ready = True


def take_over_weights(
    take: Callable[[str], None],
    *,
    layers: Mapping[str, FactoredLinear],
    owners: Mapping[str, int],
    collective: Collective,
    what: str,
) -> None:
    """Let each owner take its layers' dense weights, and set them aside no longer. Collective.

    Args:
        take: called with each layer's name, on its owner only.
        layers: converted layers by name.
        owners: layer -> the rank that owns it.
        collective: all ranks that train the model.
        what: the work, as an error names it.

    Raises SpectralError on all ranks if an owner failed.
    """
    work = OwnerWork()
    for name, owner in owners.items():
        if owner == collective.rank and work.problem is None:
            with work.on(name):
                take(name)
        layers[name].initial_weight = None
    agreed = collective.agree(work.problem, what=what)
    if agreed is not None:
        raise SpectralError(agreed)
