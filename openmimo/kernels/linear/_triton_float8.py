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


@triton.jit
def first_dims(numbers, IN_QUADS: tl.constexpr):
    """The dims of the first operand of a product that is cut in two: 0, 2, 4, 6, ... or 0, 1, 4, 5, ... in quads."""
    if IN_QUADS:
        return numbers // 2 * 4 + numbers % 2
    else:
        return 2 * numbers


@triton.jit
def float8_quads(pairs):
    """The float16 values of the numbers 0, 1, 4, 5, ... and of 2, 3, 6, 7, ... of a row of int16 pairs; exact.

    In this order nothing is moved between registers. It relies on the compiler to give the assembly two neighbors of a
    row at a time, which the tests on an accelerator check.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def int8_quads(pairs):
    """As `float8_quads` for int8: the bits of 1024 + 128 + number are 0x6480 + number in float16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bytes, offset, low, high;
        xor.b32 bytes, $2, 0x80808080;
        mov.b32 offset, 0x64806480;
        prmt.b32 low, bytes, 0x64646464, 0x4140;
        prmt.b32 high, bytes, 0x64646464, 0x4342;
        sub.f16x2 $0, low, offset;
        sub.f16x2 $1, high, offset;
        }""",
        "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip
