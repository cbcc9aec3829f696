"""An image file as a network reads it: size, channels, 8 bits a channel, a dark background."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mpisjax.errors import UserError
from mpisjax.pretrained.inputs import Inputs

# Empty pixels on each side of MNIST's digits, which fill 20 of 28; the other sets fill their images.
MARGINS = {"mnist": 4 / 28}
# A pixel belongs to the object if it stands out from the background by this share of the contrast.
CONTENT = 0.15
# A file of 16 bits whose values need fewer than 13 holds those of a camera or a scan of 10 or 12 bits.
LARGEST_OF_12_BITS, LARGEST_OF_16_BITS = 4095, 65535


def read_image(path: str | Path, inputs: Inputs, crop: bool = True) -> tuple[np.ndarray, list[str]]:
    """Reads a PNG, JPEG or whatever else Pillow knows, and fits it to a network.

    A file of the right size is taken as it is, apart from colour, depth and a light background. For data sets
    of grey images any other is cropped to what stands out, put on a black square and scaled. For coloured
    ones it is cropped to the square in its middle and scaled. Pixels of more than 8 bits are scaled by the
    range of their mode: 16 bits by 65535 (by their own maximum where that is 4095 or less), floats within [0,
    1] by 1, all others by their own range.

    Args:
        path: The file.
        inputs: What the network reads; still images.
        crop: False only scales (and, for coloured ones, still crops to a square).

    Returns:
        uint8 [H, W, C], and what was done to get there, a clause each.

    Raises:
        UserError: There is no such file, it is no image, or the network reads frames.
    """
    if inputs.temporal:
        raise UserError(
            f"a network for {inputs.name} reads event frames, not images; choose another --pretrained"
        )
    height, width, channels = inputs.shape
    image, done = _in_8_bits(_open(path), path)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        done.append("put on white where it was transparent")
    if channels == 1:
        if image.convert("RGB").getextrema() != ((image.convert("L").getextrema(),) * 3):
            done.append("made grey")
        image = image.convert("L")
        level = _border(image)
        if level > 127:
            image, level = ImageOps.invert(image), 255 - level
            done.append("inverted, since its background is light")
    else:
        image = image.convert("RGB")
    if image.size != (width, height):
        before = image.size
        if channels == 1 and crop:
            image, more = _fitted(image, level, MARGINS.get(inputs.name, 0.0))
            done += more
        elif channels == 3:
            side = min(image.size)
            image = ImageOps.fit(image, (side, side), Image.Resampling.BOX)
            if image.size != before:
                done.append("cropped to the square in its middle")
        shrinks, size = image.size[0] > width, f"{image.size[0]} x {image.size[1]}"
        image = image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
        done.append(f"scaled from {size} to {width} x {height}")
    return np.asarray(image, np.uint8).reshape(height, width, channels), done


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as file:
            file.load()
            return ImageOps.exif_transpose(file).copy()
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}; name a PNG or JPEG file") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); name a PNG or JPEG file") from error


def _in_8_bits(image: Image.Image, path: str | Path) -> tuple[Image.Image, list[str]]:
    """Grey values of more than 8 bits, which Pillow would clip at 255, scaled to 0..255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image, []
    pixels = np.asarray(image, np.float64)
    low, high = float(pixels.min()), float(pixels.max())
    if not np.isfinite([low, high]).all():
        raise UserError(f"{path} has pixels that are no finite numbers; write it again without them")
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high, kind = 0.0, 1.0, "the range of floats"
    elif image.mode != "F" and low >= 0 and LARGEST_OF_12_BITS < high <= LARGEST_OF_16_BITS:
        low, high, kind = 0.0, float(LARGEST_OF_16_BITS), "the range of 16 bits"
    else:
        low, kind = min(low, 0.0), "its own range"
    scaled = 255 * (pixels - low) / ((high - low) or 1.0)
    return Image.fromarray(np.rint(scaled).astype(np.uint8)), [
        f"scaled to 8 bits from {kind}, {low:g} to {high:g}"
    ]


def _border(image: Image.Image) -> int:
    """The median of the outermost pixels."""
    pixels = np.asarray(image)
    return int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))


def _fitted(image: Image.Image, level: int, margin: float) -> tuple[Image.Image, list[str]]:
    """What stands out from the background, stretched from black to white, in the middle of a square."""
    pixels = np.asarray(image, np.float32) - level
    contrast = float(pixels.max())
    if contrast <= 0:
        return image, []
    pixels = np.clip(pixels / contrast, 0, 1)
    rows, columns = (np.flatnonzero((pixels > CONTENT).any(axis)) for axis in (1, 0))
    found = np.rint(255 * pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.uint8)
    side = max(round(max(found.shape) / (1 - 2 * margin)), 1)
    square = Image.new("L", (side, side))
    square.paste(Image.fromarray(found), ((side - found.shape[1]) // 2, (side - found.shape[0]) // 2))
    return square, [
        "stretched to full contrast",
        f"cropped to its content of {found.shape[1]} x {found.shape[0]}",
    ]
