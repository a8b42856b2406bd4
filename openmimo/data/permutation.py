"""A random order of any number of things that takes no memory: each place is computed by itself.

A Feistel network permutes the numbers of twice as many bits; what falls outside the range is permuted again until it
falls inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

_ROUNDS = 8
_MASK_64 = 2**64 - 1


def permuted(index: int, size: int, key: int) -> int:
    """The number at place `index` of the order of range(size) that `key` (64 bits) names."""
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
    """64 well mixed bits (the last steps of SplitMix64: Steele, Lea and Flood, 2014)."""
    value = (value * 0x9E3779B97F4A7C15 + key) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
