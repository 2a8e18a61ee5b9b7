"""Numbers of a run that its metrics hold: FLOPs a token, memory by use."""

import torch

from spectral_scale.engine.build import Run
from spectral_scale.layers.convert import spectral_layers
from spectral_scale.metrics.flops import (
    attention_flops_per_token,
    model_flops_per_token,
    model_flops_utilization,
    peak_flops,
    sst_linear_flops,
)
from spectral_scale.metrics.measures import peak_memory_bytes, tensor_bytes


def flops_per_token(run: Run) -> float:
    """Training FLOPs a token of the whole model, from its shapes."""
    a, spectral = run.architecture, run.config.spectral
    head = a.vocab_size * a.embedding_size
    dense = head + sum(
        info.global_shape[0] * info.global_shape[1]
        for fqn, info in run.table.items()
        if info.role == "matrix" and "embed" not in fqn and "lm_head" not in fqn
    )
    layers = spectral_layers(run.model).values()
    return model_flops_per_token(
        dense_elements=dense,
        attention_flops=attention_flops_per_token(
            num_layers=a.num_layers,
            hidden_size=a.hidden_size,
            sequence_length=run.config.model.sequence_length,
        ),
        spectral_flops=sum(
            sst_linear_flops(
                m.out_features, m.in_features, m.spectral_rank, 1, spectral.storage
            )
            for m in layers
        ),
    )


def utilization(run: Run, flops_a_token: float, tokens_per_second: float) -> float | None:
    """MFU over all ranks; None where the device's peak is not known."""
    if run.backend.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(run.backend.device), run.config.train.precision)
    return model_flops_utilization(
        flops_per_token=flops_a_token,
        tokens_per_second=tokens_per_second,
        peak_flops_per_second=peak and peak * run.backend.collective.world_size,
    )


def memory(run: Run) -> dict[str, float]:
    """Bytes this rank keeps, by use, and its peak so far."""
    trained = [p for p in run.model.parameters() if p.requires_grad]
    states = [t for state in run.optimizer.state.values() for t in state.values()]
    return {
        "memory/weights_bytes": tensor_bytes(run.model.parameters()),
        "memory/gradients_bytes": sum(p.nbytes for p in trained),
        "memory/states_bytes": tensor_bytes(states),
        "memory/bank_bytes": 0 if run.controller is None else run.controller.nbytes(),
        "memory/peak_bytes": peak_memory_bytes(run.backend.device),
    }


def parameter_counts(run: Run) -> dict[str, int]:
    """Trained elements, and elements of the dense model they stand for."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    converted = sum(m.in_features * m.out_features for m in spectral_layers(run.model).values())
    dense = sum(p.numel() for f, p in run.model.named_parameters() if run.table[f].layer is None)
    return {"parameters_trained": trained, "parameters_dense": dense + converted}
