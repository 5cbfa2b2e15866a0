"""Draw pictures with Pillow and say, patch by patch, what is in them.

Everything is drawn on a canvas of 256×256 and reduced to the tile's 128×128, so edges are smooth. While objects are
drawn, a second canvas records which object covers which pixel; from it come the dense targets of the warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

CANVAS, TILE, GRID = 256, 128, 8
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FIELDS = ("kind", "colour", "centre", "size", "height", "second")
"""Dense targets of a patch: what rules it, of which colour, whether that object's middle lies in it, how large the
object is (root of its visible area, and height, both in patches), and which character has its middle there, too (0 for
none: small letters share patches)."""
UNKNOWN = -100
"""A target that says nothing (and costs nothing)."""

# hue in degrees, saturation and value in 0…1: (low, high) each
_HSV = {
    "red": ((-8, 6), (0.8, 1), (0.7, 1)), "orange": ((24, 34), (0.85, 1), (0.92, 1)),
    "yellow": ((51, 59), (0.75, 1), (0.92, 1)), "green": ((98, 145), (0.6, 1), (0.4, 0.85)),
    "blue": ((210, 238), (0.7, 1), (0.55, 1)), "purple": ((268, 286), (0.55, 0.95), (0.45, 0.8)),
    "pink": ((325, 345), (0.3, 0.55), (0.95, 1)), "brown": ((20, 30), (0.6, 0.85), (0.32, 0.5)),
    "black": ((0, 360), (0, 0.1), (0, 0.13)), "white": ((0, 360), (0, 0.03), (0.95, 1)),
    "gray": ((0, 360), (0, 0.05), (0.42, 0.65)),
}  # fmt: skip


_NAMELESS_HUES = ((66, 90), (158, 200), (246, 260), (294, 316))


def rgb(colour: str | None, rng: Random) -> tuple[int, int, int]:
    """One of the many shades that go by the name; without a name one between the names: lime, teal, indigo, magenta."""
    if colour is None:
        return _from_hsv(rng.uniform(*rng.choice(_NAMELESS_HUES)), rng.uniform(0.4, 1), rng.uniform(0.55, 1))
    (h0, h1), (s0, s1), (v0, v1) = _HSV[colour]
    return _from_hsv(rng.uniform(h0, h1), rng.uniform(s0, s1), rng.uniform(v0, v1))


def _from_hsv(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    import colorsys

    r, g, b = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


@dataclass
class Picture:
    """A canvas under construction; `kinds` and `colours` name each object drawn so far, from 1 on."""

    image: Image.Image
    cover: Image.Image = field(default_factory=lambda: Image.new("L", (CANVAS, CANVAS), 0))
    kinds: list[str] = field(default_factory=list)
    colours: list[str | None] = field(default_factory=list)
    background: str | None = None

    def stamp(self, mask: Image.Image, at: tuple[int, int], fill: object, kind: str, colour: str | None) -> None:
        """Put `fill` (a colour or an RGBA picture) through `mask` with its corner at `at` (may lie outside)."""
        self.image.paste(fill, at, mask)  # type: ignore[arg-type]
        self.kinds.append(kind)
        self.colours.append(colour)
        self.cover.paste(len(self.kinds), at, mask.point(lambda v: 255 if v > 100 else 0))

    def targets(self, kind_index: dict[str, int]) -> np.ndarray:
        """Dense targets (6, 64) int64 in the order of `FIELDS`; `kind_index` numbers the kinds, 0 is background."""
        step = CANVAS // 64
        cover = np.asarray(self.cover)[step // 2 :: step, step // 2 :: step]
        cells = cover.reshape(GRID, 8, GRID, 8).transpose(0, 2, 1, 3).reshape(GRID * GRID, 64)
        owner = np.zeros(GRID * GRID, np.int64)
        most = np.full(GRID * GRID, 15)  # of 64 samples: under a quarter covered is background
        table = np.full((5, len(self.kinds) + 1), UNKNOWN, np.int64)
        second = np.zeros((1, GRID * GRID), np.int64)
        table[:3, 0] = 0, COLOURS.index(self.background) if self.background else UNKNOWN, 0
        middles: list[tuple[int, int]] = []
        for index, (kind, colour) in enumerate(zip(self.kinds, self.colours, strict=True), 1):
            rows, columns = np.nonzero(cover == index)
            if not len(rows):
                continue
            count = (cells == index).sum(1)
            owner = np.where(count > most, index, owner)
            most = np.maximum(most, count)
            size, height = round(len(rows) ** 0.5 / 8), -(-(int(np.ptp(rows)) + 1) // 8)
            shade = COLOURS.index(colour) if colour else UNKNOWN
            table[:, index] = kind_index[kind], shade, 0, min(size, GRID), min(height, GRID)
            middles.append((int(rows.mean() // 8) * GRID + int(columns.mean() // 8), index))
        taken: set[int] = set()
        for patch, index in middles:  # the middle names its object even where that covers little, as of thin letters
            if patch not in taken:
                owner[patch] = index
            elif (kind := self.kinds[index - 1]) in CHARACTERS:
                second[0, patch] = CHARACTERS.index(kind) + 1
            taken.add(patch)
        targets = np.concatenate([table[:, owner], second])
        targets[2, [patch for patch, _ in middles]] = 1
        return targets


def _grain(spread: float) -> Image.Image:
    """Normal noise around middle grey, 64×64; the same for the same spread (Pillow's effect_noise never repeats)."""
    noise = np.random.default_rng(int(spread * 1e9)).normal(128, spread, (64, 64))
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8))


def background(rng: Random, avoid: set[str]) -> Picture:
    """A plain, graded or speckled background whose colour has none of the names in `avoid`."""
    name: str | None = rng.choice([c for c in COLOURS if c not in avoid])
    if rng.random() < 0.4 and "white" not in avoid:
        name = "white"
    elif rng.random() < 0.25 and not avoid & {"white", "gray", "pink"}:
        name = None
    if name is None:
        base = _from_hsv(rng.uniform(0, 360), rng.uniform(0.03, 0.2), rng.uniform(0.8, 1))
    else:
        base = rgb(name, rng)
    image = Image.new("RGB", (CANVAS, CANVAS), base)
    style = rng.random()
    if style < 0.25:
        noise = _grain(rng.uniform(8, 25)).resize((CANVAS, CANVAS), rng.choice([0, 2]))
        image = Image.blend(image, noise.convert("RGB"), rng.uniform(0.03, 0.12))
    elif style < 0.45:
        ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).point(lambda v: v * 0.15)
        shade = (0, 0, 0) if name != "black" else (60, 60, 60)
        image.paste(shade, (0, 0), ramp)
    return Picture(image, background=name)


def _outline(shape: str, side: float) -> list[tuple[float, float]]:
    """Corners in a box of half-width 1, y down; circle and ring are drawn by ellipse."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0, -0.92), (0.95, 0.75), (-0.95, 0.75)]
    if shape == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if shape == "cross":
        a = side
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    if shape == "star":
        turns = [math.pi * k / 5 - math.pi / 2 for k in range(10)]
        return [
            (math.cos(t) * (side if k % 2 else 1), math.sin(t) * (side if k % 2 else 1)) for k, t in enumerate(turns)
        ]
    turns = [2 * math.pi * k / 40 for k in range(40)]  # heart
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1)
        for t in turns
    ]


def shape_mask(shape: str, radius: float, rng: Random) -> Image.Image:
    """Mask of the shape, a square a little wider than 2·radius, turned by up to 12 degrees."""
    side = max(6, round(radius * 2.2))
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    centre = side / 2
    if shape in ("circle", "ring"):
        draw.ellipse([centre - radius, centre - radius, centre + radius, centre + radius], fill=255)
        if shape == "ring":
            hole = radius * rng.uniform(0.5, 0.66)
            draw.ellipse([centre - hole, centre - hole, centre + hole, centre + hole], fill=0)
        return mask
    turn = math.radians(rng.uniform(-12, 12))
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    thin = rng.uniform(0.28, 0.4) if shape == "cross" else rng.uniform(0.38, 0.5)
    points = [(centre + x * cos - y * sin, centre + x * sin + y * cos) for x, y in _outline(shape, thin)]
    draw.polygon(points, fill=255)
    return mask


def add_shape(
    picture: Picture, shape: str, colour: str | None, xy: tuple[float, float], radius: float, rng: Random
) -> None:
    """Draw a shape centred at xy (canvas pixels), without a colour's name in one that has none."""
    mask = shape_mask(shape, radius, rng)
    corner = round(xy[0] - mask.width / 2), round(xy[1] - mask.height / 2)
    picture.stamp(mask, corner, rgb(colour, rng), shape, colour)


def add_emoji(picture: Picture, art: np.ndarray, kind: str, xy: tuple[float, float], side: float, rng: Random) -> None:
    """Draw an emoji centred at xy with the given side; `art` is RGBA."""
    image = Image.fromarray(art)
    if rng.random() < 0.4:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        image = image.rotate(rng.uniform(-18, 18), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = _tinted(image, rng)
    stretch = rng.uniform(0.88, 1.13)
    size = max(8, round(side * stretch)), max(8, round(side / stretch))
    image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5)
    corner = round(xy[0] - size[0] / 2), round(xy[1] - size[1] / 2)
    picture.stamp(image.getchannel("A"), corner, image.convert("RGB"), kind, None)


def add_flag(picture: Picture, art: np.ndarray, country: str, rng: Random) -> None:
    """Draw a flag (RGBA, any size) over most of the canvas: hung straight, sometimes round or a little turned."""
    image = Image.fromarray(art)
    width = rng.uniform(155, 240)
    height = min(width * art.shape[0] / art.shape[1] * rng.uniform(0.88, 1.12), 244)
    image = image.resize((round(width), round(height)), Image.Resampling.BILINEAR, reducing_gap=1.5)
    if rng.random() < 0.25:  # a round badge, cut from the middle
        disc = Image.new("L", image.size, 0)
        radius = min(width, height) / 2
        ImageDraw.Draw(disc).ellipse(
            [width / 2 - radius, height / 2 - radius, width / 2 + radius, height / 2 + radius], fill=255
        )
        image.putalpha(ImageChops.multiply(disc, image.getchannel("A")))
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, expand=True)
    if rng.random() < 0.5:
        image = _tinted(image, rng)
    corner = tuple(round(rng.uniform(4, max(4, CANVAS - side - 4))) for side in image.size)
    picture.stamp(image.getchannel("A"), corner, image.convert("RGB"), country, None)  # type: ignore[arg-type]


def _tinted(image: Image.Image, rng: Random) -> Image.Image:
    """Another painter's colours."""
    bands = [
        band.point([min(255, round(v * g)) for v in range(256)])
        for band, g in zip(image.split()[:3], (rng.uniform(0.75, 1.15) for _ in "rgb"), strict=True)
    ]
    return Image.merge("RGBA", [*bands, image.getchannel("A")])


def add_sketch(picture: Picture, ink: np.ndarray, kind: str, colour: str, rng: Random) -> None:
    """Draw a sketch (`ink`, 28×28 uint8) with a pen of some width: turned, slanted, stretched or mirrored."""
    image = Image.fromarray(ink)
    image = image.crop(image.getbbox())
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(130, 225) / max(image.size)
    size = [max(20, round(side * scale * rng.uniform(0.85, 1.12))) for side in image.size]
    image = image.resize((min(size[0], 244), min(size[1], 244)), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:  # leaning to one side
        lean = rng.uniform(-0.3, 0.3)
        wider = image.width + round(abs(lean) * image.height)
        shift = lean * image.height if lean > 0 else 0
        data = (1, lean, -shift, 0, 1, 0)
        image = image.transform(
            (min(wider, 244), image.height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR
        )
    if rng.random() < 0.7:
        image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR, expand=True)
    least = rng.uniform(40, 120)  # a low threshold makes a thick pen
    mask = image.point([min(255, max(0, round((v - least) * 4))) for v in range(256)])
    mask = mask.crop(mask.getbbox())
    corner = [round(rng.uniform(0, max(0, CANVAS - side))) for side in mask.size]
    picture.stamp(mask, (corner[0], corner[1]), rgb(colour, rng), kind, colour)
    # the drawing's whole box counts as covered, strokes alone would leave most patches empty
    box = (*corner, min(CANVAS, corner[0] + mask.width), min(CANVAS, corner[1] + mask.height))
    picture.cover.paste(len(picture.kinds), box)


@lru_cache(maxsize=4000)
def font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def add_text(
    picture: Picture, text: str, path: str, colour: str, rng: Random, width: float,
    rows: tuple[float, float] = (0, CANVAS), columns: tuple[float, float] = (0, CANVAS),
) -> None:  # fmt: skip
    """Write `text` about `width` canvas pixels wide, somewhere within rows and columns; one object per character."""
    probe = font(path, 60)
    left, top, right, bottom = probe.getbbox(text)
    scale = min(width / max(1, right - left), min(150, rows[1] - rows[0] - 12) / max(1, bottom - top))
    face = font(path, max(16, int(60 * scale) // 4 * 4))
    left, top, right, bottom = face.getbbox(text)
    w, h = right - left, bottom - top
    x = rng.uniform(columns[0] + 6, max(columns[0] + 6, columns[1] - w - 6)) - left
    y = rng.uniform(rows[0] + 6, max(rows[0] + 6, rows[1] - h - 6)) - top
    fill = rgb(colour, rng)
    for index, character in enumerate(text):
        offset = face.getlength(text[:index])
        x0, y0, x1, y1 = face.getbbox(character)
        if x1 <= x0 or y1 <= y0:
            continue
        mask = Image.new("L", (int(x1 - x0) + 2, int(y1 - y0) + 2), 0)
        ImageDraw.Draw(mask).text((-x0, -y0), character, font=face, fill=255)
        corner = round(x + offset + x0), round(y + y0)
        picture.stamp(mask, corner, fill, character, colour)
        # the whole box of a character counts as covered, strokes alone would leave most patches empty
        picture.cover.paste(len(picture.kinds), (*corner, corner[0] + mask.width, corner[1] + mask.height))


def finish(picture: Picture, rng: Random, strength: float = 1.0) -> np.ndarray:
    """Reduce to the tile with a little blur, noise, light and contrast; (128, 128, 3) uint8."""
    image = picture.image
    if rng.random() < 0.25 * strength:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.0)))
    image = image.resize(
        (TILE, TILE), rng.choice([Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.BILINEAR])
    )
    pixels = np.asarray(image).astype(np.float32)
    if rng.random() < 0.5 * strength:
        pixels = (pixels - 128) * rng.uniform(0.85, 1.1) + 128 + rng.uniform(-12, 12)
    if rng.random() < 0.3 * strength:
        pixels += np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 9), pixels.shape)
    return pixels.clip(0, 255).astype(np.uint8)
