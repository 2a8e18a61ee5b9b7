"""The ways to decompose a matrix, best first, for the device it is on.

On GPUs torch's default is gesvdj, a Jacobi method of fixed sweeps, which is quick for small
matrices and may lose orthogonality on large ones, where gesvd is also the faster of the two.
GPUs with fast float64 have a third way: the eigenvectors of the Gram matrix in float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Driver = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Tall W (m, n) -> U (m, n), sigma (n,) descending, V^T (n, n), in any dtype and on any device."""
LARGE = 512
"""Shorter side above which gesvd precedes gesvdj on a GPU."""
SMALLEST = 1e-5
"""Singular values below this fraction of the largest have no left vector of their own from the
Gram matrix."""
FULL_RATE_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))
"""Compute capabilities with float64 at half the rate of float32: P100, V100, A100, H100, B200."""


def drivers(weight: Tensor, *, on_cuda: bool) -> list[tuple[str, Driver]]:
    """Name and function of each driver for a tall matrix (m, n), in the order to try them."""
    default: list[tuple[str, Driver]] = [("the default driver", _default)]
    last: list[tuple[str, Driver]] = [("float64 on the CPU", _float64_on_cpu)]
    if not on_cuda:
        return default + last
    gesvd: list[tuple[str, Driver]] = [("gesvd", _gesvd)]
    if weight.shape[1] <= LARGE:
        return default + gesvd + last
    gram: list[tuple[str, Driver]] = []
    if weight.dtype == torch.float32 and has_fast_float64(weight.device):
        gram = [("float64 Gram matrix", gram_svd)]
    return gram + gesvd + default + last


def has_fast_float64(device: torch.device) -> bool:
    """Whether this GPU computes float64 at a rate that makes it a sensible choice."""
    return torch.cuda.get_device_capability(device) in FULL_RATE_FLOAT64


def gram_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a tall float32 matrix (m, n) by the eigenvectors of W^T W in float64.

    Squaring costs half of float64's digits: a value of sigma has an error of about
    1e-16 sigma_max^2 / sigma, and two columns of U are orthogonal up to
    1e-16 sigma_max^2 / (sigma_i sigma_j). Down to `SMALLEST` sigma_max both are about float32's own
    rounding or less. Columns of U for smaller values are zero: in matrices of 100 or more rows
    `fix_null_space` takes these values for zero and chooses the columns itself. Needs about 8 n^2
    float32 elements of memory besides the factors, since rows are taken n at a time.
    """
    columns = weight.shape[1]
    blocks = weight.split(columns)
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=weight.device)
    for block in blocks:
        wide = block.double()
        gram.addmm_(wide.mT, wide)
    squares, v = torch.linalg.eigh(gram)
    squares, v = squares.flip(0), v.flip(1)
    sigma = squares.clamp_min(0).sqrt()
    kept = sigma > SMALLEST * sigma[0]
    scaled = v * torch.where(kept, 1 / sigma, 0)
    u = torch.cat([(block.double() @ scaled).to(weight.dtype) for block in blocks])
    return u, sigma.to(weight.dtype), v.mT.to(weight.dtype)


def _default(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.linalg.svd(weight, full_matrices=False))


def _gesvd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.linalg.svd(weight, full_matrices=False, driver="gesvd"))


def _float64_on_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.linalg.svd(weight.to("cpu", torch.float64), full_matrices=False))
