"""The table of training methods, and how a run opens its method and its gradient filter."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spectral_scale.config.methods import method_name
from spectral_scale.config.presets import Architecture
from spectral_scale.config.schema import RunConfig, SpectralConfig
from spectral_scale.methods.base import ControllerParts, Method, MethodController
from spectral_scale.methods.convert import freeze_dense
from spectral_scale.methods.frod.method import METHOD as FROD
from spectral_scale.methods.galore.method import METHOD as GALORE
from spectral_scale.methods.layer import factored_layers
from spectral_scale.methods.lora.method import METHOD as LORA
from spectral_scale.methods.sst.method import METHOD as SST
from spectral_scale.methods.tangent.method import METHOD as TANGENT
from spectral_scale.models.weights import InitialWeights
from spectral_scale.optim.filter.spectral_filter import SpectralFilter
from spectral_scale.parallel.collective import Collective
from spectral_scale.parallel.store import ParameterStore
from spectral_scale.parallel.table import ParameterTable

METHODS: Mapping[str, Method] = {
    "full": Method(),
    "sst": SST,
    "tangent": TANGENT,
    "lora": LORA,
    "relora": LORA,
    "galore": GALORE,
    "frod": FROD,
}
"""Every method by the name that `method_name` gives; a specification has the same name."""


def convert_model(
    model: nn.Module,
    config: SpectralConfig,
    frozen_dtype: torch.dtype,
    method: Method | None = None,
) -> None:
    """Make a dense meta model the one that the method trains, in place.

    Args:
        model: converted.
        config: the method's settings.
        frozen_dtype: the dtype of frozen weights.
        method: the method itself; by default the shipped one that `config` names.
    """
    (method or METHODS[method_name(config)]).convert(model, config, frozen_dtype)
    if not config.train_dense:
        freeze_dense(model, frozen_dtype, also=config.train_also)


def open_controller(
    method: Method,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: RunConfig,
    collective: Collective,
    store: ParameterStore,
    weights: InitialWeights,
    dtype: torch.dtype,
    fresh: bool,
) -> MethodController | None:
    """The method's controller, None if nothing happens between steps; see `ControllerParts`.

    Collective. `weights` are the initial dense weights.
    """
    layers = factored_layers(model)

    def dense_weight(name: str) -> Tensor:
        layer = layers[name]
        return weights.get(f"{name}.weight", (layer.out_features, layer.in_features))

    return method.controller(
        ControllerParts(
            model=model,
            optimizer=optimizer,
            config=config,
            collective=collective,
            store=store,
            dense_weight=dense_weight,
            dtype=dtype,
            fresh=fresh,
        )
    )


def open_filter(
    config: RunConfig,
    architecture: Architecture,
    table: ParameterTable,
    store: ParameterStore,
) -> SpectralFilter | None:
    """The run's spectral filter of gradients, or None if the run has none. Collective.

    Call it after the method gave all parameters their values: anchors copy them.
    Raises ConfigError if gradients are not reached, or if nothing can be filtered.
    """
    if not config.filter.enabled:
        return None
    shards = store.shards()
    return SpectralFilter(
        shards,
        {fqn: table[fqn].role for fqn in shards.shapes},
        config.filter,
        seed=config.train.seed,
        head_size=architecture.head_size,
    )
