"""What Darknet's sections compute, written as plain loops over numbers: slow, short, and independent of torch.

Maps are [C, H, W]; the rules are those of darknet-format.md §2.3.
"""

import math
from collections.abc import Sequence

import numpy as np


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def max_pool(x: np.ndarray, size: int, stride: tuple[int, int], padding: int) -> np.ndarray:
    """Darknet's window starts at -padding/2 and ignores what lies outside."""
    return pool(x, size, stride, padding, max)


def mean_pool(x: np.ndarray, size: int, stride: tuple[int, int], padding: int) -> np.ndarray:
    """The same window, and the mean of the cells inside the map."""
    return pool(x, size, stride, padding, lambda values: sum(values) / len(values))


def pool(x: np.ndarray, size: int, stride: tuple[int, int], padding: int, reduce) -> np.ndarray:
    C, H, W = x.shape
    h, w = ((side + padding - size) // step + 1 for side, step in zip((H, W), stride, strict=True))
    y = np.zeros((C, h, w), x.dtype)
    for c, i, j in np.ndindex(y.shape):
        rows = [i * stride[0] - padding // 2 + m for m in range(size)]
        columns = [j * stride[1] - padding // 2 + n for n in range(size)]
        y[c, i, j] = reduce([x[c, row, col] for row in rows if 0 <= row < H for col in columns if 0 <= col < W])
    return y


def convolve(
    x: np.ndarray, weight: np.ndarray, stride: tuple[int, int], padding: int, groups: int = 1, dilation: int = 1
) -> np.ndarray:
    """Convolve x [C, H, W] with weight [filters, C/groups, k, k]; the output has the size that no dilation has."""
    (H, W), (filters, per_group, k, _) = x.shape[1:], weight.shape
    h, w = ((side + 2 * padding - k) // step + 1 for side, step in zip((H, W), stride, strict=True))
    y = np.zeros((filters, h, w))
    for o, i, j in np.ndindex(y.shape):
        first = o // (filters // groups) * per_group
        for m, n in np.ndindex(k, k):
            row, column = i * stride[0] + (m - padding) * dilation, j * stride[1] + (n - padding) * dilation
            if 0 <= row < H and 0 <= column < W:
                y[o, i, j] += (weight[o, :, m, n] * x[first : first + per_group, row, column]).sum()
    return y


def normalise(x: np.ndarray, bias, scale, mean, variance, eps: float) -> np.ndarray:
    """Batch normalisation with the statistics of training; the first axis of x is the channel."""
    y = np.empty_like(x)
    for c in range(len(x)):
        y[c] = scale[c] * (x[c] - mean[c]) / math.sqrt(variance[c] + eps) + bias[c]
    return y


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.1 * x)


def blur(x: np.ndarray, kind: int, stride: tuple[int, int]) -> np.ndarray:
    """The depthwise filter of antialiasing: [1 2 1]⊗[1 2 1]/16 with padding 1, or 2×2 means."""
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16 if kind == 1 else np.full((2, 2), 0.25)
    weight = np.broadcast_to(kernel, (len(x), 1, *kernel.shape))
    return convolve(x, weight, stride, 1 if kind == 1 else 0, groups=len(x))


def binarise(weight: np.ndarray) -> np.ndarray:
    """The filter's mean |w| with the sign of every weight."""
    y = np.empty_like(weight)
    for o in range(len(weight)):
        y[o] = np.where(weight[o] > 0, 1, -1) * np.abs(weight[o]).mean()
    return y


def reorg3d(x: np.ndarray, s: int) -> np.ndarray:
    """Space to depth: output channel (dy·s+dx)·C + c."""
    C, H, W = x.shape
    y = np.zeros((C * s * s, H // s, W // s), x.dtype)
    for c, row, column in np.ndindex(x.shape):
        y[(row % s * s + column % s) * C + c, row // s, column // s] = x[c, row, column]
    return y


def reorg(x: np.ndarray, s: int) -> np.ndarray:
    """YOLOv2's order: the loops of Darknet run over the input's own size, on flat arrays."""
    C, H, W = x.shape
    flat, y, out_c = x.ravel(), np.zeros(x.size, x.dtype), C // (s * s)
    for k, j, i in np.ndindex(C, H, W):
        column, row = i * s + k // out_c % s, j * s + k // out_c // s
        y[i + W * (j + H * k)] = flat[column + W * s * (row + H * s * (k % out_c))]
    return y.reshape(C * s * s, H // s, W // s)


def add_weighted(inputs: Sequence[np.ndarray], weights: np.ndarray, normalization: str) -> np.ndarray:
    """Sum maps of one size with weights [inputs, 1 or C]; the result has the channels of the first."""
    total = np.zeros_like(inputs[0])
    for c, i, j in np.ndindex(total.shape):
        w = [float(row[c if len(row) > 1 else 0]) for row in weights]
        if normalization == "softmax":
            w = [math.exp(value - max(w)) for value in w]
        elif normalization != "none":
            w = [max(value, 0.001) for value in w]
        share = 1 if normalization == "none" else 1 / (sum(w) + 0.0001)
        total[c, i, j] = sum(
            w[k] * share * each[c, i, j] for k, each in enumerate(inputs) if c < len(each)
        )  # a map with fewer channels adds nothing to the others, but its weight counts
    return total


def add_strided(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """pjreddie's shortcut between sizes: every n-th cell of the larger map meets a cell of the smaller."""
    stride, sample = max(1, other.shape[1] // x.shape[1]), max(1, x.shape[1] // other.shape[1])
    total = x.copy()
    height, width = min(x.shape[1], other.shape[1]), min(x.shape[2], other.shape[2])
    for c, i, j in np.ndindex(min(len(x), len(other)), height, width):
        total[c, i * sample, j * sample] += other[c, i * stride, j * stride]
    return total


def shuffle(x: np.ndarray, groups: int) -> np.ndarray:
    """ShuffleNet's order of channels: the first of every group, then the second of every group, and so on."""
    each = len(x) // groups
    return np.stack([x[group * each + c] for c in range(each) for group in range(groups)])


def eca(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """ECA: channel c is gated by the means of its neighbours, as many as the kernel; beyond the ends they are zero."""
    means, reach = [channel.mean() for channel in x], kernel.size // 2
    y = np.empty_like(x)
    for c in range(len(x)):
        near = range(max(0, c - reach), min(len(x), c + reach + 1))
        y[c] = x[c] * sigmoid(sum(kernel.flat[n - c + reach] * means[n] for n in near))
    return y


def channel_gate(x: np.ndarray, squeeze: np.ndarray, excite: np.ndarray) -> np.ndarray:
    """CBAM, equation 2: sigmoid(W1 relu(W0 mean) + W1 relu(W0 maximum)) of every channel."""
    parts = [[channel.mean() for channel in x], [channel.max() for channel in x]]
    total = sum(excite @ np.maximum(squeeze @ np.array(part), 0) for part in parts)
    return np.stack([channel * sigmoid(value) for channel, value in zip(x, total, strict=True)])


def spatial_gate(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """CBAM, equation 3: sigmoid of a convolution over [mean of the channels; maximum of the channels]."""
    raw = convolve(np.stack((x.mean(0), x.max(0))), weight, (1, 1), weight.shape[-1] // 2)[0]
    y = np.empty_like(x)
    for c, i, j in np.ndindex(x.shape):
        y[c, i, j] = x[c, i, j] * sigmoid(raw[i, j])
    return y


def softmax(x: Sequence[float], temperature: float = 1) -> list[float]:
    power = [math.exp((value - max(x)) / temperature) for value in x]
    return [value / sum(power) for value in power]


def gaussian_box(
    values: Sequence[float],
    cell: tuple[int, int],
    cells: tuple[int, int],
    anchor,
    size,
    *,
    scale_x_y: float,
    point: str,
) -> tuple[list[float], list[float]]:
    """Decode one anchor of [Gaussian_yolo] at `cell` (row, column): xywh in pixels and the score of each class."""
    x, sx, y, sy, w, sw, h, sh, objectness, *classes = values
    certainty = 1 - (sigmoid(sx) + sigmoid(sy) + sigmoid(sw) + sigmoid(sh)) / 4
    width, height = math.exp(w) * anchor[0], math.exp(h) * anchor[1]
    left = (cell[1] + sigmoid(x) * scale_x_y - 0.5 * (scale_x_y - 1)) / cells[1] * size[1]
    top = (cell[0] + sigmoid(y) * scale_x_y - 0.5 * (scale_x_y - 1)) / cells[0] * size[0]
    away = {"center": 0, "left_top": 0.5, "right_bottom": -0.5}[point]
    scores = [sigmoid(objectness) * sigmoid(value) * certainty for value in classes]
    return [left + away * width, top + away * height, width, height], scores
