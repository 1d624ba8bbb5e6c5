"""A classifier as one graph of tensor operations, with or without its preprocessing.

The preprocessing equals `Preprocessing.view` bit for bit, for images of any size: resizing is a matrix
product for each direction, with weights that the graph computes from the height and width of its input.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.models.problem_type import is_multi_label
from hf_cifar.models.rejection import rejection_of
from hf_cifar.transforms.preprocessing import Preprocessing
from hf_cifar.transforms.resampling import KERNELS
from hf_cifar.transforms.resizing import PILLOW_MAY_START_VERTICALLY

# Fractional bits of a weight, see `resizing._fraction_bits`; the coarse part of a weight has fewer, so
# that float32 sums its products with pixels exactly.
PILLOW_BITS, COARSE_BITS = 22, 11


class ClassifierGraph(nn.Module):
    """A classifier that returns (logits, probabilities), both [N, K]; of a model that rejects images, see
    `models.distance.rejecting`, also distances [N].

    Its input is `pixel_values` [N, 3, h, w] float, or, with a preprocessing, images [N, H, W, 3] uint8 of any
    size. The probabilities of a multi-label model are independent of each other.
    """

    def __init__(self, model: PreTrainedModel, preprocessing: Preprocessing | None = None) -> None:
        super().__init__()
        self.model = model
        self.pixels = None if preprocessing is None else PixelGraph(preprocessing)
        self.multi_label = is_multi_label(model)
        self.rejects = rejection_of(model) is not None

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.pixels is not None:
            images = self.pixels.preprocessing.normalize(self.pixels(images))
        output = self.model(pixel_values=images)
        logits = output.logits
        answers = logits, logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)
        return (*answers, output.distances) if self.rejects else answers


class Axis(NamedTuple):
    """How one side of an image is resampled; tensors of float64.

    length, resized: [], pixels before and after resizing. places [size]: which pixels of the resized image
    are kept; those outside it get the border's colour. start, scale: [], a place is centred at
    start + (place + 1/2) * scale before resizing.
    """

    length: Tensor
    resized: Tensor
    places: Tensor
    start: Tensor
    scale: Tensor

    @property
    def kept(self) -> Tensor:
        """True for the places [size] that are inside the resized image."""
        return (self.places >= 0) & (self.places < self.resized)

    @property
    def loss(self) -> Tensor:
        """How many pixels resizing removes, negative if it adds some."""
        return self.length - self.resized


class PixelGraph(nn.Module):
    """`Preprocessing.view` for images of a size that is unknown until the graph runs.

    images [N, H, W, 3] uint8 -> float [N, 3, *size], whole numbers 0..255.
    Raises: UserError for a preprocessing without a fixed output size, or one that pads to another shape than
    a square.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        height, width = preprocessing.size
        if preprocessing.border_first and height != width:
            raise UserError(
                f"the checkpoint pads images to {height} x {width} pixels, and only squares can be padded "
                "inside the graph; leave out --with_preprocessing"
            )
        self.preprocessing = preprocessing

    def forward(self, images: Tensor) -> Tensor:
        view = self.preprocessing
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        if view.border_first:
            pixels = self._squared(pixels)
        lengths = pixels.shape[-2:]
        if view.border is not None and not view.border_first:
            rows, columns = self._fitted(*lengths)
            units = [torch.tensor(2.0**PILLOW_BITS, dtype=torch.float64)] * 2
        else:
            wholes = self._wholes(*lengths)
            rows, columns = (
                self._cropped(*each) for each in zip(lengths, wholes, view.size, strict=True)
            )
            units = [self._unit(*each) for each in zip(lengths, wholes, strict=True)]
        down = self._matrix(rows, lengths[0], units[0])
        across = self._matrix(columns, lengths[1], units[1])
        if view.library == "pillow" and PILLOW_MAY_START_VERTICALLY:
            shrinks_most = rows.loss > (2 * columns.loss).clamp_min(0)
            pixels = torch.cond(shrinks_most, _down_first, _across_first, (pixels, down, across))
        else:
            pixels = _across_first(pixels, down, across)
        if view.border is None or view.border_first:
            return pixels
        return torch.where(rows.kept[:, None] & columns.kept, pixels, self._colour)

    @property
    def _colour(self) -> Tensor:
        return torch.tensor(self.preprocessing.border, dtype=torch.float32).view(3, 1, 1)

    def _squared(self, pixels: Tensor) -> Tensor:
        """Add a border that makes pixels [N, 3, H, W] square, see `Preprocessing.shaped`."""
        side = torch.sym_max(*pixels.shape[-2:])
        inside = []
        for axis in (2, 3):
            length = pixels.shape[axis]
            places = torch.arange(side) - (side - length) // 2
            inside.append((places >= 0) & (places < length))
            pixels = pixels.index_select(axis, torch.where(inside[-1], places, 0))
        return torch.where(inside[0][:, None] & inside[1], pixels, self._colour)

    def _wholes(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing, before the crop, see `Preprocessing.resized`."""
        resize = self.preprocessing.resize
        if resize is None:
            return height, width
        if isinstance(resize, int):
            short = torch.sym_min(height, width)
            return resize * height // short, resize * width // short
        return resize

    def _cropped(self, length: int, whole: int, size: int) -> Axis:
        """The axis of an image that is resized and cropped, see `Preprocessing.corner` and `box`."""
        side, resized = _number(length), _number(whole)
        middle = (resized - size) / 2
        first = middle.floor() if self.preprocessing.crop_rounds_down else middle.round()
        start, stop = first * (side / resized), (first + size) * (side / resized)
        return Axis(side, resized, _arange(size), start, (stop - start) / size)

    def _fitted(self, height: int, width: int) -> list[Axis]:
        """The axes of an image that is resized to fit into the input, see `Preprocessing._fitted`."""
        sides, sizes = (_number(height), _number(width)), self.preprocessing.size
        ratio = torch.maximum(sides[0] / sizes[0], sides[1] / sizes[1])
        axes = []
        for side, size in zip(sides, sizes, strict=True):
            resized = (side / ratio).round().clamp_min(1)
            places = _arange(size) - ((size - resized) / 2).floor()
            axes.append(Axis(side, resized, places, torch.zeros_like(side), side / resized))
        return axes

    def _unit(self, length: int, whole: int) -> Tensor:
        """Two to the power of the number of fractional bits of a weight, see `resizing._fraction_bits`."""
        if self.preprocessing.library == "pillow":
            return torch.tensor(2.0**PILLOW_BITS, dtype=torch.float64)
        scale = _number(length) / _number(whole)
        largest = self._weights((_arange(whole) + 0.5) * scale, scale, length).max()
        powers = 2.0 ** torch.arange(23, dtype=torch.float64)
        fitting = ((largest * powers + 0.5).floor() < 2**15).sum()
        return powers[fitting - 1]

    def _matrix(self, axis: Axis, length: int, unit: Tensor) -> Tensor:
        """Weights in fixed point [2 * size, length]: the coarse parts, then the rest, see `FixedPoint`."""
        centers = axis.start + (axis.places + 0.5) * axis.scale
        weights = self._weights(centers, axis.scale, length)
        fine = weights.sign() * (weights.abs() * unit + 0.5).floor()
        low = (unit / 2**COARSE_BITS).clamp_min(1)
        coarse = (fine / low).round() * low
        return torch.cat((coarse / unit, (fine - coarse) / unit)).to(torch.float32)

    def _weights(self, centers: Tensor, scale: Tensor, length: int) -> Tensor:
        """Weights [size, length] of pixels around centers [size], see `resampling.Taps.of`."""
        kernel, support = KERNELS[self.preprocessing.interpolation]
        period = 2 * _number(length)
        centers = centers - (centers / period).floor() * period
        centers = torch.where(centers > period / 2, period - centers, centers)[:, None]
        stretch = scale.clamp_min(1)
        reach, index = support * stretch, _arange(length)
        first, last = (centers - reach + 0.5).floor(), (centers + reach + 0.5).floor()
        taps = (index >= first) & (index < last)
        weights = torch.where(taps, kernel((index + 0.5 - centers) / stretch), 0.0)
        return weights / weights.sum(dim=-1, keepdim=True)


def _number(length: int) -> Tensor:
    """A length of the input as a tensor [] of float64."""
    return torch.scalar_tensor(length, dtype=torch.float64)


def _arange(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.float64)


def _across_first(pixels: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _resize_down(_resize_across(pixels, across), down)


def _down_first(pixels: Tensor, down: Tensor, across: Tensor) -> Tensor:
    return _resize_across(_resize_down(pixels, down), across)


def _resize_down(pixels: Tensor, down: Tensor) -> Tensor:
    """[N, C, H, L] -> [N, C, h, L], whole numbers 0..255."""
    return _whole_numbers(*(down @ pixels).chunk(2, dim=2))


def _resize_across(pixels: Tensor, across: Tensor) -> Tensor:
    """[N, C, L, W] -> [N, C, L, w], whole numbers 0..255."""
    return _whole_numbers(*(pixels @ across.T).chunk(2, dim=3))


def _whole_numbers(coarse: Tensor, rest: Tensor) -> Tensor:
    """Round the sum of both half up, see `resizing.FixedPoint`."""
    coarse = coarse + 0.5
    whole = coarse.floor()
    return (whole + (coarse - whole + rest).floor()).clamp(0, 255)
