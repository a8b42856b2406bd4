"""Products of llama.cpp on the CPU, called in the process of `bench_packed`.

`LLAMA_CPP_LIBRARIES` is a folder with `libggml-base.so` and `libggml-cpu*.so` of llama.cpp: that of an own build, or
`package/bins/linux-x64` of the npm package `@node-llama-cpp/linux-x64`. Of several variants for the processor, the one
with the highest score of llama.cpp itself is used.

Weights lie in memory as `ggml_quantize_chunk` writes them. The second layout of Q4_0, which llama.cpp writes when it
loads a model, is not used.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARIES = "LLAMA_CPP_LIBRARIES"
_TYPES = {"Q4_0": 2, "TQ2_0": 35}  # `enum ggml_type` of ggml.h
_FLOAT32 = 0
_SPARE_BYTES = 2**26  # each call takes its working memory from the context
_PRODUCTS = 4  # of a call, so that the start of threads does not count for one product
_MAX_ERROR = 0.02


class _Parameters(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@dataclass(frozen=True)
class Products:
    """Products of one matrix x with copies of a weight.

    Attributes:
        call: Multiplies x with the next `count` copies.
        count: Products of a call.
        free: Frees weights and results; no call may follow.
    """

    call: Callable[[], None]
    count: int
    free: Callable[[], None]


class Ggml:
    """The functions of llama.cpp's tensor library.

    Args:
        folder: The folder of the libraries.

    Attributes:
        version: Version of the library.
        variant: File of the variant for this processor.

    Raises:
        FileNotFoundError: The folder has no such library.
    """

    def __init__(self, folder: Path):
        variants = sorted(folder.glob("libggml-cpu*.so"))
        if not variants:
            raise FileNotFoundError(f"{folder} has no libggml-cpu*.so: set {LIBRARIES} to the libraries of llama.cpp")
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        loaded = [(ctypes.CDLL(str(path)), path) for path in variants]
        self._cpu, path = loaded[0] if len(loaded) == 1 else max(loaded, key=lambda pair: pair[0].ggml_backend_score())
        self.variant = path.name
        pointer, integer, length = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._declare("ggml_version", ctypes.c_char_p)
        self._declare("ggml_init", pointer, _Parameters)
        self._declare("ggml_free", None, pointer)
        self._declare("ggml_new_tensor_2d", pointer, pointer, integer, length, length)
        self._declare("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self._declare("ggml_get_data", pointer, pointer)
        self._declare("ggml_nbytes", ctypes.c_size_t, pointer)
        self._declare("ggml_new_graph", pointer, pointer)
        self._declare("ggml_build_forward_expand", None, pointer, pointer)
        self._declare(
            "ggml_quantize_chunk", ctypes.c_size_t, integer, pointer, pointer, length, length, length, pointer
        )
        self._cpu.ggml_graph_compute_with_ctx.restype = integer
        self._cpu.ggml_graph_compute_with_ctx.argtypes = (pointer, pointer, integer)
        self._cpu.ggml_cpu_init()
        self.version = self._base.ggml_version().decode()

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self._base, name)
        function.restype, function.argtypes = result, arguments

    def products(
        self, weight_OD: torch.Tensor, x_RD: torch.Tensor, kind: str, *, copies: int, threads: int
    ) -> Products:
        """Prepares products of x with copies of a weight; compares one with torch.

        Args:
            weight_OD: A float32 matrix of the values -1 and 0. Both formats hold it exactly; Q4_0 holds no 1 in a block
                with a -1.
            x_RD: float32 rows.
            kind: Name of the format, `Q4_0` or `TQ2_0`.
            copies: Number of copies of the weight, at least `_PRODUCTS`; together they exceed the caches.
            threads: CPU threads.

        Returns:
            The products.

        Raises:
            RuntimeError: A product differs from that of torch by more than the rounding of x to int8 explains.
        """
        base, (outputs, dims) = self._base, weight_OD.shape
        size = _SPARE_BYTES + copies * (weight_OD.numel() + 4 * x_RD.shape[0] * outputs) + x_RD.nbytes
        context = base.ggml_init(_Parameters(size, None, False))
        x = base.ggml_new_tensor_2d(context, _FLOAT32, dims, len(x_RD))
        ctypes.memmove(base.ggml_get_data(x), x_RD.data_ptr(), x_RD.nbytes)
        graphs, outs = [], []
        weight, weight_bytes = None, 0
        for number in range(copies - copies % _PRODUCTS):
            previous, weight = weight, base.ggml_new_tensor_2d(context, _TYPES[kind], dims, outputs)
            weight_bytes = base.ggml_nbytes(weight)
            if previous is None:
                base.ggml_quantize_chunk(
                    _TYPES[kind], weight_OD.data_ptr(), base.ggml_get_data(weight), 0, outputs, dims, None
                )
            else:
                ctypes.memmove(base.ggml_get_data(weight), base.ggml_get_data(previous), weight_bytes)
            if number % _PRODUCTS == 0:
                graphs.append(base.ggml_new_graph(context))
            outs.append(base.ggml_mul_mat(context, weight, x))
            base.ggml_build_forward_expand(graphs[-1], outs[-1])
        turn = iter(range(1 << 60))

        def call() -> None:
            if self._cpu.ggml_graph_compute_with_ctx(context, graphs[next(turn) % len(graphs)], threads):
                raise RuntimeError(f"llama.cpp does not compute a product of {kind}")

        call()
        out_RO = torch.empty(len(x_RD), outputs)
        ctypes.memmove(out_RO.data_ptr(), base.ggml_get_data(outs[0]), out_RO.nbytes)
        expected_RO = x_RD @ weight_OD.T
        error = float((out_RO - expected_RO).norm() / expected_RO.norm())
        if not error < _MAX_ERROR:
            raise RuntimeError(f"the product of llama.cpp's {kind} differs from that of torch by {error:.1%}")
        return Products(call, _PRODUCTS, lambda: base.ggml_free(context))


def ggml_of_environment() -> Ggml | None:
    """Returns the libraries of the folder that the environment names, or None without one."""
    folder = os.environ.get(LIBRARIES)
    return Ggml(Path(folder)) if folder else None
