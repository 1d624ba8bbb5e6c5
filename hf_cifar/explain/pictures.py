"""Maps, feature maps and filters as pictures: uint8 [H, W, 3]."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.explain.methods import Example
from hf_cifar.explain.target_layer import trace
from hf_cifar.models.classifier import describe

MIN_WIDTH = 160  # smaller pictures are enlarged by whole numbers
FOR, AGAINST = (255, 118, 0), (30, 110, 255)  # orange and blue, also for the colour-blind
OPACITY = 0.75
LAYERS, CHANNELS = 6, 8
MAX_FILTERS = 64
TILE, GAP = 40, 2  # pixels


def overlay(view: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """Colour a greyed image [H, W, 3] uint8 by a map [H, W]: orange for the class, blue against it.

    The strongest percent of the map has the full colour; a map of zeros leaves the image grey. What all
    pixels have in common, as in Grad-CAM's maps of few places, says nothing about where, and is taken off.
    """
    attribution = attribution - max(0.0, attribution.min())
    strongest = np.quantile(np.abs(attribution), 0.99) or np.abs(attribution).max() or 1.0
    strength = np.clip(attribution / strongest, -1, 1)[..., None]
    grey = view.astype(float) @ (0.299, 0.587, 0.114)
    base = (0.3 + 0.7 * grey / 255)[..., None] * (255, 255, 255)
    colour = np.where(strength > 0, FOR, AGAINST)
    opacity = OPACITY * np.abs(strength)
    return enlarged((base * (1 - opacity) + colour * opacity).round().astype(np.uint8))


def enlarged(picture: np.ndarray) -> np.ndarray:
    """Enlarge a small picture by a whole number, so that it can be looked at."""
    factor = math.ceil(MIN_WIDTH / picture.shape[1])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def feature_maps(model: PreTrainedModel, example: Example) -> tuple[np.ndarray, list[str]]:
    """Draw the eight channels that vary most, for six layers from the first to the last, a row each.

    Returns the picture, and the names of the layers with the sizes of their maps.
    Raises: UserError for a model without feature maps.
    """
    calls, _ = trace(model, example.pixel_values)
    if not calls:
        raise UserError(f"{describe(model)} has no feature maps; leave out feature_maps")
    places = np.unique(np.linspace(0, len(calls) - 1, LAYERS).round().astype(int))
    chosen = [calls[place] for place in places]
    rows = []
    for call in chosen:
        maps = call.layout.maps(call.output.detach().float())[0]
        channels = maps.flatten(1).std(dim=1).topk(min(CHANNELS, len(maps))).indices
        row = torch.zeros(CHANNELS, *maps.shape[1:], device=maps.device)
        row[: len(channels)] = _stretched(maps[channels])
        rows.append(nn.functional.interpolate(row[None], (TILE, TILE), mode="nearest")[0])
    tiles = (255 * torch.cat(rows)).round().to(torch.uint8).cpu().numpy()
    names = [f"{call.name} ({call.layout.grid[0]} x {call.layout.grid[1]})" for call in chosen]
    return _mosaic(np.repeat(tiles[..., None], 3, axis=3), CHANNELS), names


def _stretched(maps: Tensor) -> Tensor:
    """Scale each of the maps [D, h, w] to 0..1."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp_min(1e-12)


def filters(model: PreTrainedModel) -> tuple[np.ndarray, str]:
    """Draw up to 64 filters of the first convolution, in colour; grey is zero. Returns its name too.

    Raises: UserError for a model that does not begin with a convolution of RGB images.
    """
    first = next(
        (
            (name, layer.weight.detach().float()[:MAX_FILTERS])
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d) and layer.in_channels == 3
        ),
        None,
    )
    if first is None:
        raise UserError(
            f"{describe(model)} has no convolution of the image's three colours; leave out filters"
        )
    name, weights = first
    scaled = 127.5 + 127.5 * weights / weights.abs().max().clamp_min(1e-12)
    side = max(1, TILE // weights.shape[-1])
    tiles = scaled.permute(0, 2, 3, 1).round().to(torch.uint8).cpu().numpy()
    tiles = tiles.repeat(side, axis=1).repeat(side, axis=2)
    return _mosaic(tiles, math.ceil(math.sqrt(len(tiles)))), name


def _mosaic(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Put tiles [N, h, w, 3] side by side in rows, with gaps of grey."""
    height, width = tiles.shape[1] + GAP, tiles.shape[2] + GAP
    rows = math.ceil(len(tiles) / columns)
    canvas = np.full((rows * height - GAP, columns * width - GAP, 3), 128, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = number // columns * height, number % columns * width
        canvas[top : top + tiles.shape[1], left : left + tiles.shape[2]] = tile
    return canvas
