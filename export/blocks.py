"""
export/blocks.py: weights in 8 or 4 bits, for both formats.

Neighbors in a row of a matrix, 32 at a time, share one scale, and each becomes a small integer:

    weight = scale * q        8 bits    q from -127 to 127
                              4 bits    q from -8 to 7

One large weight makes its 31 neighbors coarse, and only those. Hence blocks, and not one scale per matrix.

For 8 bits the largest weight sets the scale. Of 4 bits there are only 16 values, and cutting the largest
weight short can be better for the other 31, so to_4_bits tries several scales. Some matrices keep 8 bits
besides. One is down_proj: a few of its inputs are 20,000 times larger than the average, and so is the error
that they make of a wrong weight.

All of this together: on SmolLM2-135M-Instruct 4 bits cost 10% of perplexity, not 21% (tests/real.py rounding;
docs/released.md).
"""

import numpy as np

BLOCK = 32
KEEP_8_BITS = ("embed_tokens", "lm_head", "v_proj", "down_proj")  # the head reaches every score directly
STEPS = (-8, -9, -8.5, -7.5, -7, -6.5, -6)  # where a scale puts the largest weight; -9 is cut to -8


def to_8_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32) float32 -> scale (N, 1) float32, q (N, 32) int8. The largest weight becomes 127 or -127."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return scale, np.rint(blocks * inverse(scale)).astype(np.int8)


def to_4_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32) float32 -> scale (N, 1) float32, q + 8 (N, 32) uint8, from 0 to 15.

    Each way to choose q has a scale with the smallest squared error. The best of all ways counts.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    best_scale, best_q = np.zeros_like(largest), np.zeros_like(blocks)
    least = np.full_like(largest, np.inf)
    for steps in STEPS:
        q = np.rint(blocks * inverse(largest / np.float32(steps))).clip(-8, 7)
        scale = (q * blocks).sum(axis=1, keepdims=True) * inverse((q * q).sum(axis=1, keepdims=True))
        error = np.square(scale * q - blocks).sum(axis=1, keepdims=True)
        best_scale, best_q = np.where(error < least, scale, best_scale), np.where(error < least, q, best_q)
        least = np.minimum(least, error)
    return best_scale, (best_q + 8).astype(np.uint8)


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for 0: the scale of a block of zeros."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
