"""Measures of a run that are logged: FLOPs a token, utilization, memory by use."""

import torch

from spectral_scale.engine.counts import count_parameters
from spectral_scale.engine.run import Run
from spectral_scale.metrics.flops import (
    matrix_products,
    model_flops_per_token,
    model_flops_utilization,
    peak_flops,
)
from spectral_scale.metrics.measures import peak_memory_bytes, tensor_bytes
from spectral_scale.optim.build import state_tensors
from spectral_scale.parallel.dtensor_collectives import local


def flops_per_token(run: Run) -> float:
    """Training FLOPs a token of the whole model, from its shapes."""
    a = run.architecture
    products = matrix_products(
        run.table.values(), vocab_size=a.vocab_size, embedding_size=a.embedding_size
    )
    return model_flops_per_token(
        products,
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        sequence_length=run.config.model.sequence_length,
    )


def utilization(run: Run, flops_a_token: float, tokens_per_second: float) -> float | None:
    """Model FLOPs utilization over all ranks; None where the device's peak is not known."""
    if run.backend.device.type != "cuda":
        return None
    peak = peak_flops(torch.cuda.get_device_name(run.backend.device), run.config.train.precision)
    return model_flops_utilization(
        flops_per_token=flops_a_token,
        tokens_per_second=tokens_per_second,
        peak_flops_per_second=peak and peak * run.backend.collective.world_size,
    )


def memory(run: Run) -> dict[str, float]:
    """Bytes that this rank keeps, by use, and its peak so far, by metric path."""
    trained = [p for p in run.model.parameters() if p.requires_grad]
    return {
        "memory/weights_bytes": tensor_bytes(run.model.parameters()),
        "memory/gradients_bytes": sum(local(p).nbytes for p in trained),
        "memory/states_bytes": tensor_bytes(state_tensors(run.optimizer))
        + (0 if run.gradient_filter is None else run.gradient_filter.nbytes),
        "memory/bank_bytes": 0 if run.controller is None else run.controller.nbytes(),
        "memory/peak_bytes": peak_memory_bytes(run.backend.device),
    }


def parameter_counts(run: Run) -> dict[str, int]:
    """The number of trained elements, and of elements of the dense model."""
    counts = count_parameters(run.model, run.table)
    return {"parameters_trained": counts.trained, "parameters_dense": counts.dense}
