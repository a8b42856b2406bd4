"""Root-mean-square normalization (arXiv 1910.07467)."""

import functools
import struct
from typing import Any

import torch

from openmimo.kernels import native

_MAX_NATIVE_NUMBERS = 1 << 18  # more are worth torch's threads
_CALL = struct.Struct("3P3qd")  # `norm_call` of native/rows.c


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`x` [..., D] divided by its root mean square over D, times `weight` [D]; shape and dtype of x.

    The mean is taken in float32 (float64 stays); the quotient is cast to the dtype of x before the weight multiplies
    it, as Hugging Face does. Differentiable in x and weight.
    """
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, epsilon)
    if x.is_cpu and x.numel() <= _MAX_NATIVE_NUMBERS and _is_readable(x, weight):
        return _native_rms_norm(x.contiguous(), weight.contiguous(), epsilon)
    return (x * _inverse_rms(x, epsilon)).to(x.dtype) * weight


def _is_readable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the native kernel is there and can read these by address."""
    return x.dtype in native.DTYPES and weight.shape[0] == x.shape[-1] and native.library() is not None


def _native_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    out = torch.empty_like(x)
    dims = weight.shape[0]
    rows, is_bfloat16 = x.numel() // max(dims, 1), x.dtype == torch.bfloat16
    _entry()(_CALL.pack(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, dims, is_bfloat16, epsilon))
    return out


@functools.cache
def _entry() -> native.Entry:
    return native.entry("openmimo_rms_norm")


def _inverse_rms(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """1 / sqrt(mean of squares + epsilon) of each row, [..., 1], in float32 or float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.full_like(norm, epsilon).addcmul_(norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """Half the time of autograd through the formula: x, weight and one number a row are all that is kept.

    With r = 1 / rms: dx = r g w - x r^3 mean(g w x), dw = sum over rows of r g x. Products and sums are in float32 or
    better: in bfloat16 a sum over the rows of a batch would lose most of its digits.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse_rms = _inverse_rms(x, epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        dtypes = x.dtype, weight.dtype
        grad, x, weight = (tensor.to(inverse_rms.dtype) for tensor in (grad, x, weight))
        grad_x_product = (grad * x).flatten(0, -2)
        mean = (grad_x_product @ weight).view(inverse_rms.shape) / x.shape[-1]
        grad_weight = inverse_rms.flatten() @ grad_x_product
        grad_x = (grad * weight * inverse_rms).sub_(x * (mean * inverse_rms.pow(3)))
        return grad_x.to(dtypes[0]), grad_weight.to(dtypes[1]), None
