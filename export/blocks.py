"""
export/blocks.py: weights in 8 or 4 bits, for both formats.

Neighbors in a row of a matrix, 32 at a time, share one scale, and each becomes a small integer:

    weight = scale * q        8 bits    q from -127 to 127
                              4 bits    q from -8 to 7

One large weight makes its 31 neighbors coarse, and only those. Hence blocks, and not one scale per matrix.
llama.cpp and ONNX Runtime also round what the weights are multiplied by to 8 bits, since products of integers
are fast. They use the same blocks, and for the same reason: in released models one activation can be 20,000
times larger than the average.
"""

import numpy as np

BLOCK = 32


def to_8_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32) float32 -> scale (N, 1) float32, q (N, 32) int8. The largest weight becomes 127 or -127."""
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    return scale, np.rint(blocks * inverse(scale)).astype(np.int8)


def to_4_bits(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32) float32 -> scale (N, 1) float32, q + 8 (N, 32) uint8, from 0 to 15.

    The largest weight becomes -8, because there is no 8. So its scale has the opposite sign.
    """
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / -8
    return scale, (blocks * inverse(scale) + 8.5).astype(np.uint8).clip(max=15)


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / scale, and 0 for 0: the scale of a block of zeros."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
