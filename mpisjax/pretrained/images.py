"""An image file as a network reads it: size, channels, 8 bits a channel, a dark background."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from mpisjax.data import folders
from mpisjax.errors import UserError
from mpisjax.pretrained.ink import LEAST_CONTRAST, find_ink, thicken
from mpisjax.pretrained.inputs import Inputs


class Look(NamedTuple):
    """How the images of a grey data set look, so that a photograph can be brought to the same look.

    Attributes:
        margin: Empty pixels on each side, in parts of the side.
        lines: Whether lines are drawn on a page; else a thing lies on a plain ground.
        line_width: Of the lines, in parts of what is drawn; 0: as they come.
    """

    margin: float = 0.0
    lines: bool = False
    line_width: float = 0.0


# MNIST's digits fill 20 of 28 pixels; the other sets fill their images.
LOOKS = {"digits": Look(0.0, True, 0.17), "mnist": Look(4 / 28, True), "fashion_mnist": Look()}
PHOTOGRAPHS = ("cifar10", "cifar100")
# A pixel belongs to the object if it stands out from the background by this share of the contrast. A part of it is a
# speck if it has less than this share of what the largest part has.
CONTENT, SPECK = 0.3, 0.03
# A file of 16 bits whose values need fewer than 13 holds those of a camera or a scan of 10 or 12 bits.
LARGEST_OF_12_BITS, LARGEST_OF_16_BITS = 4095, 65535


def read_image(
    path: str | Path, inputs: Inputs, crop: bool = True, fit: str = "letterbox"
) -> tuple[np.ndarray, list[str]]:
    """Reads a PNG, JPEG or whatever else Pillow knows, and fits it to a network.

    A file of the right size is taken as it is, apart from colour, depth and a light background. For digits and
    Fashion-MNIST any other is freed of uneven light, cropped to what stands out, put on a black square and scaled. For
    CIFAR it is cropped to the square in its middle and scaled. For a data set of the user's own it is read as the data
    set was. Pixels of more than 8 bits are scaled by the range of their mode: 16 bits by 65535 (by their own maximum
    where that is 4095 or less), floats within [0, 1] by 1, all others by their own range.

    Args:
        path: The file.
        inputs: What the network reads; still images.
        crop: False only scales (and, for coloured ones, still crops to a square).
        fit: Of a data set of the user's own: "letterbox" or "crop", as its `data.fit`.

    Returns:
        uint8 [H, W, C], and what was done to get there, a clause each.

    Raises:
        UserError: There is no such file, it is no image, nothing stands out in it, or the network reads frames.
    """
    if inputs.temporal:
        raise UserError(f"a network for {inputs.name} reads event frames, not images; choose another --pretrained")
    if inputs.name not in (*LOOKS, *PHOTOGRAPHS):
        return _as_trained(path, inputs, fit)
    height, width, channels = inputs.shape
    image, done = _in_8_bits(_open(path), path)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        done.append("put on white where it was transparent")
    if channels == 3:
        image, more = _square(image.convert("RGB"), (width, height))
    else:
        if image.convert("RGB").getextrema() != ((image.convert("L").getextrema(),) * 3):
            done.append("made grey")
        image = image.convert("L")
        if crop and image.size != (width, height):
            image, more = _fitted(image, LOOKS[inputs.name], path)
        else:
            image, more = _dark(image, path)
    done += more
    if image.size != (width, height):
        shrinks, size = image.size[0] > width, f"{image.size[0]} x {image.size[1]}"
        image = image.resize((width, height), Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)
        done.append(f"scaled from {size} to {width} x {height}")
    return np.asarray(image, np.uint8).reshape(height, width, channels), done


def _as_trained(path: str | Path, inputs: Inputs, fit: str) -> tuple[np.ndarray, list[str]]:
    """Reads a file as a data set of the user's own is read."""
    height, width, channels = inputs.shape
    side = width if width == height else 0
    if not Path(path).is_file():
        raise UserError(f"there is no image {path}; name a PNG or JPEG file")
    try:
        pixels, size = folders.read_image(path, image_size=side, fit=fit, color="grey" if channels == 1 else "rgb")
    except ValueError as error:
        raise UserError(f"{path} cannot be read as an image ({error}); name a PNG or JPEG file") from error
    if pixels.shape != inputs.shape:
        raise UserError(f"{path} has {size[0]} x {size[1]} pixels; this network reads {width} x {height}")
    _check_not_blank(pixels, path)
    words = {"letterbox": "letterboxed", "crop": "cropped"}[fit]
    return pixels, [] if size == (width, height) else [f"{words} from {size[0]} x {size[1]} to {width} x {height}"]


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
    return Image.fromarray(np.rint(scaled).astype(np.uint8)), [f"scaled to 8 bits from {kind}, {low:g} to {high:g}"]


def _blank(path: str | Path) -> UserError:
    return UserError(
        f"{path} is blank: nothing in it stands out from its background; name an image of one thing, darker or lighter "
        "than what is behind it"
    )


def _check_not_blank(pixels: np.ndarray, path: str | Path) -> None:
    if int(pixels.max()) - int(pixels.min()) < 255 * LEAST_CONTRAST:
        raise _blank(path)


def _dark(image: Image.Image, path: str | Path) -> tuple[Image.Image, list[str]]:
    """The image, inverted where its background is light."""
    pixels = np.asarray(image)
    _check_not_blank(pixels, path)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) <= 127:
        return image, []
    return ImageOps.invert(image), ["inverted, since its background is light"]


def _square(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, list[str]]:
    """The square in the middle of a photograph that has not the right size."""
    side = min(image.size)
    if image.size == size or image.size == (side, side):
        return image, []
    return ImageOps.fit(image, (side, side), Image.Resampling.BOX), ["cropped to the square in its middle"]


def _fitted(image: Image.Image, look: Look, path: str | Path) -> tuple[Image.Image, list[str]]:
    """What stands out from the background, in even light and from black to white, in the middle of a square."""
    found = find_ink(np.asarray(image), look.lines)
    if found is None:
        raise _blank(path)
    strength, light_page = found
    done = ["inverted, since its background is light"] if light_page else []
    done += ["freed of uneven light", "stretched to full contrast"]
    content = _cropped(strength)
    if look.line_width:
        thicker = thicken(content, look.line_width)
        if thicker.shape != content.shape:
            content = _cropped(thicker)
            done.append("its thin lines drawn thicker")
    height, width = content.shape
    done.append(f"cropped to its content of {width} x {height}")
    side = max(round(max(content.shape) / (1 - 2 * look.margin)), 1)
    square = Image.new("L", (side, side))
    drawn = Image.fromarray(np.rint(255 * content).astype(np.uint8))
    square.paste(drawn, ((side - width) // 2, (side - height) // 2))
    return square, done


def _cropped(strength: np.ndarray) -> np.ndarray:
    """The smallest rectangle with all that stands out, but for specks."""
    places, number = ndimage.label(strength > CONTENT)
    sizes = ndimage.sum_labels(strength, places, np.arange(1, number + 1))
    kept = np.isin(places, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))
    rows, columns = (np.flatnonzero(kept.any(axis)) for axis in (1, 0))
    return strength[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
