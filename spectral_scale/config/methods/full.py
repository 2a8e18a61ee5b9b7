"""Dense training: every weight trains as it is."""

from spectral_scale.config.methods.spec import MethodSpec

FULL = MethodSpec(
    name="full",
    title="dense training",
    muon=True,
    counted={"full": {}},
    headline_settings=(),
)
