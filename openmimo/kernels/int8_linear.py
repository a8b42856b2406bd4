"""Linear layers whose weights are int8 with a scale for each output: half the bytes of bfloat16 to read a token.

R rows, D input dim, O output dim.
"""

import torch

from openmimo.kernels import native

MAX_ROWS = 32  # as in native/int8.c
_LARGEST = 127
_INT8_LINEAR = native.Function("openmimo_int8_linear", "4P4q")  # `int8_call` of native/int8.c


def quantize_rows(weight_OD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest int8 [O, D], symmetric about 0, and the float32 scales [O] that give the weight back.

    A row's largest magnitude becomes 127, so no number is off by more than half of its row's scale.
    """
    wide_OD = weight_OD.detach().float()
    largest_O = wide_OD.abs().amax(dim=1)
    scale_O = torch.where(largest_O == 0, 1.0, largest_O / _LARGEST)  # NaN stays NaN
    return (wide_OD / scale_O[:, None]).round().to(torch.int8), scale_O


def int8_linear_reference(x: torch.Tensor, weight_OD: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    """The definition of `int8_linear`."""
    return ((x.float() @ weight_OD.float().T) * scale_O).to(x.dtype)


def int8_linear(x: torch.Tensor, weight_OD: torch.Tensor, scale_O: torch.Tensor) -> torch.Tensor:
    """x [..., D], times weights int8 [O, D] with float32 scales [O]: [..., O] in the dtype of x, computed in float32.

    A few rows on a CPU are one native call, and a row then has the same bits in every batch. No gradients.
    """
    fits = weight_OD.dtype == torch.int8 and weight_OD.is_contiguous() and weight_OD.shape[1:] == x.shape[-1:]
    is_few = x.is_cpu and x.dim() == 2 and 1 <= x.shape[0] <= MAX_ROWS and x.dtype in native.DTYPES
    if not fits or not is_few or native.library() is None:
        return int8_linear_reference(x, weight_OD, scale_O)
    x_RD, scale_O = x.detach().float().contiguous(), scale_O.float().contiguous()
    (rows, dims), outputs = x_RD.shape, weight_OD.shape[0]
    if scale_O.shape != (outputs,):
        raise ValueError(f"there are {outputs} outputs, but scales {tuple(scale_O.shape)}")
    out_RO = x_RD.new_empty(rows, outputs)
    addresses = (tensor.data_ptr() for tensor in (x_RD, weight_OD, scale_O, out_RO))
    _INT8_LINEAR.call(_INT8_LINEAR.pack(*addresses, rows, dims, outputs, torch.get_num_threads()))
    return out_RO.to(x.dtype)
