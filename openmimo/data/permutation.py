"""A pseudorandom permutation of range(size) without a table: each element is computed independently.

A Feistel network permutes all numbers of an even number of bits. A result outside the range is permuted again until it
is inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

_ROUNDS = 8
_MASK_64 = 2**64 - 1


def permuted(index: int, size: int, key: int) -> int:
    """Element `index` of the permutation of range(size) that is selected by `key` (64 bits)."""
    assert 0 <= index < size
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + (number << 48), key) & mask)
        index = left << half_bits | right
        if index < size:
            return index


def _mixed(value: int, key: int) -> int:
    """Mixes 64 bits with the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + key) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
