"""What stands out from its background in a photograph: the light is made even first, and a blank page is found out."""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

# The least contrast of something on a page, in parts of white. Noise, folds and the camera's vignette stay below it.
LEAST_CONTRAST = 0.12
# A line is narrower than this part of the longer side of its picture; a shadow is wider.
WIDEST_LINE = 1 / 3
WORKING_SIZE = 96  # the background is smooth, and found on a smaller picture


def find_ink(picture: np.ndarray, lines: bool) -> tuple[np.ndarray, bool] | None:
    """How much each pixel stands out from the background, whatever the light.

    Dark things on a light page are measured by the share of the page's light that they take away, light things on a
    dark ground by the light that they add.

    Args:
        picture: [H, W], grey values from 0 to 255.
        lines: Whether lines are drawn on the page: its light is then what remains when lines are closed, shadows with
            hard edges included. Things that fill the picture have a background that is smooth, and reaches the border.

    Returns:
        Its strength, float32 [H, W], where 0 is background and the strongest 1, and whether it is darker than its
        background; None where nothing stands out.
    """
    pixels = np.asarray(picture, np.float32) / 255
    small = _shrunk(pixels)
    off = small - _surface(small)
    light = float(off[np.abs(off) > 0.05].sum()) <= 0  # what stands out is darker than its background
    if light:  # light multiplies what it falls on, so that its logarithm is smooth
        even = np.exp(_surface(np.log(np.maximum(small, 0.02))))
        # Closing alone keeps the hard edges of shadows, and closing even light the soft ones.
        grounds = [_closed(small), even * _closed(small / even)] if lines else [even]
        ground = min(grounds, key=lambda one: float(np.abs(_standing_out(small, one, light)).sum()))
    else:
        ground = 1 - _closed(1 - small) if lines else small - off
    found = _standing_out(small, ground, light)
    noise = 1.4826 * float(np.median(np.abs(found - np.median(found))))
    contrast = float(np.quantile(found, 0.998)) - 3 * noise
    if contrast < LEAST_CONTRAST:
        return None
    found = _standing_out(pixels, _resized(ground, pixels.shape), light)
    return np.clip((found - 3 * noise) / contrast, 0, 1), light


def _standing_out(pixels: np.ndarray, ground: np.ndarray, light: bool) -> np.ndarray:
    return 1 - pixels / np.maximum(ground, 0.02) if light else pixels - ground


def thicken(found: np.ndarray, width: float) -> np.ndarray:
    """Draws thin lines as wide as those of the training data; thicker ones stay as they are.

    Args:
        found: [H, W] from 0 to 1, cropped to its content.
        width: Wanted width of a line, in parts of the longer side.

    Returns:
        As `found`, with a margin where lines have grown.
    """
    wanted = width * max(found.shape)
    margin = int(np.ceil(wanted))
    found = np.pad(found, margin)
    mask = found > 0.5
    if not mask.any():
        return found
    # The mean distance from the edge of a bar is a quarter of its width.
    now = 4 * float(ndimage.distance_transform_edt(mask)[mask].mean()) - 1
    grown = (wanted - now) / 2
    if grown <= 0:
        return found[margin:-margin, margin:-margin]
    near = np.clip(grown + 0.5 - ndimage.distance_transform_edt(~mask), 0, 1)
    return np.maximum(found, near.astype(found.dtype))


def _shrunk(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape
    scale = WORKING_SIZE / max(height, width)
    if scale >= 1:
        return pixels
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))


def _resized(pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    image = Image.fromarray(pixels.astype(np.float32))
    return np.asarray(image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _closed(pixels: np.ndarray) -> np.ndarray:
    """A light page without the lines on it: a grey closing, which keeps the edges of shadows where they are."""
    side = max(round(WIDEST_LINE * max(pixels.shape)), 3)
    calm = ndimage.median_filter(pixels, 3, mode="nearest")
    return ndimage.gaussian_filter(ndimage.grey_closing(calm, (side, side), mode="nearest"), 1, mode="nearest")


def _surface(pixels: np.ndarray) -> np.ndarray:
    """A quadratic surface through the background, which reaches the border."""
    height, width = pixels.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1).reshape(-1, 6)
    values = pixels.ravel()
    edge = np.zeros(pixels.shape, bool)
    edge[[0, -1]], edge[:, [0, -1]] = True, True
    chosen = edge.ravel()
    for _ in range(8):
        fitted = terms @ np.linalg.lstsq(terms[chosen], values[chosen], rcond=None)[0]
        off = np.abs(values - fitted)
        chosen = off <= max(2.5 * 1.4826 * float(np.median(off[chosen])), 0.02)
    return fitted.reshape(pixels.shape)
