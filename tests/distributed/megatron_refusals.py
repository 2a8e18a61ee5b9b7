"""What layers, conversion and store refuse in a Megatron user's own script, and in which words."""

from collections.abc import Callable
from typing import Any

import torch

WIDTH = 12


def config(**changes: Any) -> Any:
    """A TransformerConfig; what its own checks would refuse first is put in afterwards."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    made = TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def settings(**changes: Any) -> Any:
    from spectral_scale.backends.megatron.matrix import MatrixSettings
    from spectral_scale.config.schema import SpectralConfig

    return MatrixSettings(spectral=SpectralConfig(**({"spectral_rank": 3} | changes)))


def column(group: Any, fused: Any = "none", *, size: int = 16, r: int = 3, **options: Any) -> Any:
    from spectral_scale.backends.megatron.layers import SpectralColumnParallelLinear, bound

    layer = bound(SpectralColumnParallelLinear, settings(spectral_rank=r), fused)
    groups = options.pop("groups", 2)
    common = {"config": config(num_query_groups=groups), "init_method": torch.nn.init.normal_}
    return layer(WIDTH, size, tp_group=group, **common, **options)


def unbound(group: Any) -> Any:
    from spectral_scale.backends.megatron.layers import SpectralRowParallelLinear

    common = {"config": config(), "init_method": torch.nn.init.normal_, "bias": True}
    return SpectralRowParallelLinear(WIDTH, 16, tp_group=group, input_is_parallel=True, **common)


def norm(**changes: Any) -> Any:
    from spectral_scale.backends.megatron.norm import SequenceParallelNorm

    return SequenceParallelNorm(config(**changes), WIDTH)


def converted(model: Any) -> Any:
    from spectral_scale.megatron import convert_gpt

    return convert_gpt(model, settings().spectral)


def gpt(**children: torch.nn.Module) -> Any:
    model: Any = torch.nn.ModuleDict(children)
    model.config = config()
    return model


def from_spec(group: Any) -> Any:
    """A GPTModel whose matrices have no dense weight to start from."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from spectral_scale.megatron import spectral_gpt_block_spec

    spec = spectral_gpt_block_spec(config(), settings().spectral)
    return GPTModel(config(), spec, vocab_size=16, max_sequence_length=4)


def store(model: Any, optimizer: Any = None) -> Any:
    from spectral_scale.megatron import MegatronStore

    return MegatronStore(model, optimizer)


def with_sgd(group: Any) -> Any:
    model = from_spec(group)
    return store(model, torch.optim.SGD(model.parameters(), lr=0.1))


def in_ranks(order: str = "tp-cp-ep-dp-pp", **sizes: int) -> Callable[[Any], Any]:
    """A store under another parallel state; the one of the other cases comes back."""

    def attempt(group: Any) -> Any:
        from megatron.core import parallel_state

        model = from_spec(group)
        parallel_state.destroy_model_parallel()
        try:
            parallel_state.initialize_model_parallel(order=order, **sizes)
            return store(model)
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)

    return attempt


x = torch.ones(4, 1, WIDTH)
CASES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "experts": (lambda g: column(g, is_expert=True), "does not support is_expert=True; use the"),
    "stride": (lambda g: column(g, stride=2), "stride is given by what the weight fuses; leave it"),
    "no settings": (unbound, r"needs settings; make its class with layers.bound\(\)"),
    "rank": (lambda g: column(g, r=13), "16 x 12 has no 13 triplets; lower spectral_rank to 12"),
    "gate of 15": (lambda g: column(g, "gated", size=30), "15 features cannot be sharded over 2"),
    "output gate": (lambda g: column(g, "qkv", size=48), "48 outputs are not 4 queries and 2 x 2"),
    "one group": (
        lambda g: column(g, "qkv", size=24, groups=1),
        "1 key and value heads cannot be sharded over 2 .*lower the tensor-parallel size",
    ),
    "weight": (lambda g: column(g)(x, weight=x), "takes no weight from outside"),
    "not ready": (lambda g: column(g)(x), "create the SpectralController after convert"),
    "normalization": (lambda g: norm(normalization="L2Norm"), "only LayerNorm and RMSNorm"),
    "gamma": (lambda g: norm(layernorm_zero_centered_gamma=True), "not supported .*set it False"),
    "no GPTModel": (lambda g: converted(gpt()), "no linear_qkv.*is it a GPTModel"),
    "other linear": (
        lambda g: converted(gpt(linear_qkv=torch.nn.Linear(4, 4))),
        "linear_qkv is a Linear.* build the model with get_gpt_layer_local_spec",
    ),
    "no weight": (
        lambda g: store(from_spec(g)).initial_weights(),
        "has no dense weight; it was not made by convert_gpt",
    ),
    "SGD": (with_sgd, "make the optimizer with spectral_scale.megatron.spectral_optimizer"),
    "pipeline": (in_ranks(pipeline_model_parallel_size=2), "1 tensor-parallel x 2 .*not the 4"),
    "order": (
        in_ranks("dp-cp-ep-tp-pp", tensor_model_parallel_size=2),
        "are not neighbours; call initialize_model_parallel with its default order",
    ),
}


def messages() -> dict[str, str]:
    """What each case says, on one of four ranks in a group; all leave every case together."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from spectral_scale.errors import SpectralScaleError

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    model_parallel_cuda_manual_seed(0)
    found = {}
    for name, (attempt, _) in CASES.items():
        try:
            attempt(parallel_state.get_tensor_model_parallel_group())
        except SpectralScaleError as error:
            found[name] = str(error)
    parallel_state.destroy_model_parallel()
    return found
