"""Conversion of float8_e4m3fn in Triton, for caches and weights that are read as pairs of numbers."""

import triton
import triton.language as tl


def in_assembly() -> bool:
    """Return whether kernels may use assembly, which Triton's interpreter does not run."""
    return not triton.knobs.runtime.interpret


@triton.jit
def float8_halves(pairs, IN_ASSEMBLY: tl.constexpr):
    """The float16 values of the even and of the odd numbers of float8_e4m3fn that int16 hold in pairs; exact.

    The compiler takes the bytes of each pair apart with three instructions. In assembly, one instruction collects the
    even bytes of two pairs and one converts them.
    """
    if IN_ASSEMBLY:
        even, odd = tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes;
            .reg .b16 two;
            prmt.b32 bytes, $2, 0, 0x4420;
            cvt.u16.u32 two, bytes;
            cvt.rn.f16x2.e4m3x2 $0, two;
            prmt.b32 bytes, $2, 0, 0x4431;
            cvt.u16.u32 two, bytes;
            cvt.rn.f16x2.e4m3x2 $1, two;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        even = pairs.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = (pairs >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even, odd
