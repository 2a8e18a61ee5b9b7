"""GaLore's mathematics on whole matrices: subspaces of gradients, and AdamW inside them."""

from collections.abc import Sequence
from typing import Any

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
    """`low_rank_updates` of one matrix."""
    return low_rank_updates([gradient], [state], group)[0]


@exact_products()
def low_rank_updates(
    gradients: Sequence[Tensor], states: Sequence[dict[str, Tensor]], group: dict[str, Any]
) -> list[Tensor]:
    """AdamW's updates from projected gradients, inside the subspaces; moments and `step` follow.

    One product a matrix; the rest takes as many launches for all matrices as for one. AdamW from a
    zero start gives the update itself.
    """
    low = [
        gradient @ state["projector"]
        if projects_right(gradient.shape)
        else state["projector"].t() @ gradient
        for gradient, state in zip(gradients, states, strict=True)
    ]
    sizes = [each.numel() for each in low]
    zeros = low[0].new_zeros(sum(sizes)).split(sizes)
    updates = [zero.view(each.shape) for zero, each in zip(zeros, low, strict=True)]
    adamw_step(updates, low, states, group, weight_decay=0.0, fused=False)
    return updates


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    group: dict[str, Any],
    weight_decay: float,
    *,
    fused: bool,
) -> None:
    """One step of torch's AdamW, in place: its fused kernel, or its multi-tensor operations."""
    adamw(
        list(parameters),
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=not fused,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )
