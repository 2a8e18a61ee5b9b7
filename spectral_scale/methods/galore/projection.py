"""GaLore's mathematics on whole matrices: subspaces of gradients, and AdamW inside them."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from spectral_scale.ops.decomposition import svd
from spectral_scale.ops.precision import exact_products


def projects_right(shape: tuple[int, ...]) -> bool:
    """True if the input side of a matrix (out, in) is projected: it is not the longer one."""
    return shape[0] >= shape[1]


def leading_subspace(gradient: Tensor, rank: int) -> Tensor:
    """Orthonormal (shorter side, rank): the leading singular vectors on the projected side.

    Raises ValueError for a gradient that is not finite, LinAlgError if no SVD driver succeeds.
    """
    u, _, v = svd(gradient)
    factor = v if projects_right(gradient.shape) else u
    return factor[:, :rank].contiguous()


def subspace_overlap(old: Tensor, new: Tensor) -> Tensor:
    """Mean squared cosine of the angles between two subspaces: 1 equal, 0 orthogonal; 0-dim."""
    return (old.t() @ new).square().sum() / old.shape[1]


def low_rank_state(shape: tuple[int, ...], rank: int, like: Tensor) -> dict[str, Tensor]:
    """Zero moments, (longer side, rank) or turned as the matrix is, and projector (shorter side,
    rank), of `like`'s precision and on its device."""
    moments = (shape[0], rank) if projects_right(shape) else (rank, shape[1])
    return {
        "exp_avg": like.new_zeros(moments),
        "exp_avg_sq": like.new_zeros(moments),
        "projector": like.new_zeros(min(shape), rank),
    }


@exact_products()
def low_rank_update(gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """AdamW's update from the projected gradient, inside the subspace; moments and `step` follow.

    AdamW from a zero start gives the update itself.
    """
    projector = state["projector"]
    right = projects_right(gradient.shape)
    low = gradient @ projector if right else projector.t() @ gradient
    update = torch.zeros_like(low)
    adamw_step([update], [low], [state], group, weight_decay=0.0, fused=False)
    return update


def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    states: list[dict[str, Tensor]],
    group: dict[str, Any],
    weight_decay: float,
    *,
    fused: bool,
) -> None:
    """One step of torch's AdamW, in place."""
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=False,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )
