"""Few-shot classes of drawn characters: Omniglot's small background sets where they are, generated strokes elsewhere."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tensormill.data import real_data_dir
from tensormill.errors import DataError, InvalidArgument

__all__ = ["load_omniglot", "procedural_strokes", "rotated"]

ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")


def load_omniglot(
    archives: tuple[str, ...] = ARCHIVES, *, size: int = 28, folder: Path | None = None
) -> tuple[Tensor, list[str]]:
    """Characters of Omniglot's small background sets (Lake et al., Science 2015; MIT licence).

    Needs Pillow, and the archives in the folder `omniglot` of the real data.

    Args:
        archives: which of them.
        size: images become size x size, by averaging areas of the 105 x 105 drawings.
        folder: where the archives lie; None: `real_data_dir() / "omniglot"`.

    Returns:
        Images (characters, 20, size x size) float32, ink 1 and paper 0, and the characters' names
        ("alphabet/character"), in alphabetical order.

    Raises:
        DataError: no data, a damaged archive, or no Pillow.
    """
    if size < 1:
        raise InvalidArgument(f"given size={size}, expected at least 1")
    if folder is None:
        root = real_data_dir()
        if root is None:
            raise DataError(
                "no folder of real data, expected TENSORMILL_DATA to name one with omniglot/ in it"
            )
        folder = root / "omniglot"
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("Omniglot's drawings are PNG files: install pillow (tensormill[images])") from error
    drawings: dict[str, list[Tensor]] = {}
    for archive in archives:
        before = set(drawings)  # Greek and Latin are in both archives
        try:
            with zipfile.ZipFile(folder / archive) as content:
                for name in sorted(content.namelist()):
                    parts = name.split("/")
                    if not name.endswith(".png") or len(parts) < 3:
                        continue
                    if f"{parts[-3]}/{parts[-2]}" in before:
                        continue
                    with Image.open(io.BytesIO(content.read(name))) as image:
                        pixels = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8)
                        drawing = 1 - pixels.view(1, image.height, image.width).float() / 255
                    small = F.adaptive_avg_pool2d(drawing, size)
                    drawings.setdefault(f"{parts[-3]}/{parts[-2]}", []).append(small.flatten())
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(
                f"given {str(folder / archive)!r}, expected a readable zip of PNG files: {error}"
            ) from error
    least = min((len(images) for images in drawings.values()), default=0)
    if least == 0:
        raise DataError(
            f"given {str(folder)!r}, expected PNG files of alphabet/character/drawer in {archives}"
        )
    names = sorted(drawings)
    return torch.stack([torch.stack(drawings[name][:least]) for name in names]), names


def procedural_strokes(
    characters: int, drawers: int = 20, *, size: int = 28, seed: int = 0, strokes: int = 3
) -> Tensor:
    """Generated characters: a few smooth strokes each, drawn again by every drawer with a hand of their own.

    A stroke is a quadratic curve between three points. A drawer moves all points a little, and slants, stretches and
    shifts the whole. Meant for where Omniglot is not at hand: few-shot tasks on it are of the same kind, and easier.

    Args:
        characters: number of classes.
        drawers: examples of each.
        size: images are size x size.
        seed: of the characters and hands.
        strokes: of each character.

    Returns:
        (characters, drawers, size x size) float32, ink 1 and paper 0.

    Raises:
        InvalidArgument: a number below one.

    Example:
        >>> procedural_strokes(2, 3, size=14).shape
        torch.Size([2, 3, 196])
    """
    if min(characters, drawers, size, strokes) < 1:
        raise InvalidArgument(
            f"given characters={characters}, drawers={drawers}, size={size}, strokes={strokes}, expected at least 1"
        )
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    points = torch.rand(characters, 1, strokes, 3, 2, generator=generator) * 1.4 - 0.7
    points = points + 0.06 * normal(characters, drawers, strokes, 3, 2)
    affine = torch.eye(2) + 0.12 * normal(characters, drawers, 1, 2, 2)
    points = points @ affine.mT + 0.06 * normal(characters, drawers, 1, 1, 2)
    t = torch.linspace(0, 1, 12)
    basis = torch.stack(((1 - t) ** 2, 2 * t * (1 - t), t**2))  # [3, samples]
    path = torch.einsum("cdskx,kt->cdstx", points, basis).flatten(2, 3)  # [characters, drawers, samples, 2]
    grid = torch.linspace(-1, 1, size)
    thickness = max(0.07, 1.2 / size)
    pixels = []
    for one in path:  # a character at a time: all distances at once would be large
        across = torch.exp(-(((grid - one[..., 0, None]) / thickness) ** 2))  # [drawers, samples, size]
        down = torch.exp(-(((grid - one[..., 1, None]) / thickness) ** 2))
        ink = (down[..., :, None] * across[..., None, :]).amax(1)
        pixels.append(ink.flatten(1))
    return torch.stack(pixels)


def rotated(images: Tensor) -> Tensor:
    """Every class four times: as it is, and rotated by 90, 180 and 270 degrees, as new classes.

    Args:
        images: (classes, examples, size x size).

    Returns:
        (4 x classes, examples, size x size).
    """
    size = math.isqrt(images.shape[-1])
    if size * size != images.shape[-1]:
        raise InvalidArgument(f"given images of {images.shape[-1]} pixels, expected a square number")
    square = images.unflatten(-1, (size, size))
    return torch.cat([torch.rot90(square, k, (-2, -1)).flatten(-2) for k in range(4)])
