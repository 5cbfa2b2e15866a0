"""``LlavaNextImageProcessor``: pictures of any resolution to an overview and a grid of tiles.

    images ─▶ load, upright ─▶ RGB pixels ─┬▶ resize to a tile                           the overview, first
                                           └▶ resize, pad to the best canvas, cut        the grid, row by row
                                              ─▶ pixel_values (M, N, C, tile, tile), image_sizes (M, 2)

Same names, shapes, dtypes and values as transformers' class of this name. It differs on purpose where our
``SmolVLMImageProcessor`` does (EXIF, transparency, deep greyscale, ambiguous arrays; see there), and in refusing a
``size`` of two bounds (shortest and longest edge), which no released checkpoint has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from smolvlm_fms.config_llava import AnyResolution
from smolvlm_fms.errors import ConfigurationError, ImageError
from smolvlm_fms.processing.batch import ProcessedBatch
from smolvlm_fms.processing.image_config import read_settings, write_settings
from smolvlm_fms.processing.options import CALL_ONLY, check_device, check_names, standard_form
from smolvlm_fms.processing.pixels import ChannelOrder, Picture, to_picture
from smolvlm_fms.processing.resample import Backend, as_array, prepare, resize
from smolvlm_fms.processing.sources import load_image, nest_images
from smolvlm_fms.processing.tiling import PixelMap, check_channels, in_threads
from smolvlm_fms.processing.tiling import _crop as crop_middle

__all__ = ["DEFAULTS", "LlavaNextImageProcessor"]

Array: TypeAlias = npt.NDArray[Any]

#: What ``LlavaNextImageProcessor()`` is when it is given nothing; CLIP's means and deviations.
DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "resample": int(Image.Resampling.BICUBIC),
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_pad": True,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "backend": "pil",
    "data_format": "channels_first",
    "input_data_format": None,
}


@dataclass(frozen=True, slots=True)
class _Options:
    """One call's options, checked and in one form. Sizes are (height, width) in pixels."""

    do_convert_rgb: bool
    resolution: AnyResolution
    tile: int
    overview: tuple[int, int]
    resized: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    resample: Image.Resampling
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    do_pad: bool
    backend: Backend
    input_order: ChannelOrder | None

    @classmethod
    def from_settings(cls, s: Mapping[str, Any]) -> _Options:
        """From settings in their standard form; raises ConfigurationError naming the setting."""
        for name, needed in (("do_center_crop", "crop_size"), ("do_rescale", "rescale_factor")):
            if s[name] and s[needed] is None:
                raise ConfigurationError(f"{name} is on and {needed} is not given.")
        if s["do_normalize"] and (s["image_mean"] is None or s["image_std"] is None):
            raise ConfigurationError("do_normalize is on; it needs image_mean and image_std.")
        size, crop = s["size"], s["crop_size"]
        short = size.get("shortest_edge")
        overview = (short, short) if short else (size["height"], size["width"])
        return cls(
            do_convert_rgb=s["do_convert_rgb"],
            # Canvas and fit do not depend on the tile, so tiles that leave a remainder pass, as in transformers.
            resolution=AnyResolution(tuple((h, w) for h, w in s["image_grid_pinpoints"]), tile=1, patches=1),
            tile=crop["height"] if crop else overview[0],
            overview=overview,
            resized=(short or overview) if s["do_resize"] else None,
            crop=(crop["height"], crop["width"]) if s["do_center_crop"] else None,
            resample=Image.Resampling(s["resample"]),
            rescale_factor=s["rescale_factor"] if s["do_rescale"] else None,
            mean=tuple(s["image_mean"]) if s["do_normalize"] else None,
            std=tuple(s["image_std"]) if s["do_normalize"] else None,
            do_pad=s["do_pad"],
            backend=s["backend"],
            input_order=s["input_data_format"],
        )


class LlavaNextImageProcessor:
    """Pictures to tiles, for LLaVA-1.6 and granite-vision. Every option can be given here or for one call.

    ``backend``: ``"pil"`` (Pillow's pixels, to the bit: transformers' processor without torchvision) or ``"torch"``
    (with it). The other options are transformers' of the same names.
    """

    model_input_names = ("pixel_values", "image_sizes")

    size: dict[str, int]
    crop_size: dict[str, int] | None
    image_grid_pinpoints: list[list[int]]
    backend: str

    def __init__(self, **options: Any) -> None:
        """Raises ConfigurationError for an option that does not exist or has a value that cannot be used."""
        check_names(options, DEFAULTS, "LlavaNextImageProcessor")
        self.unused: dict[str, Any] = {}  # fields of a checkpoint's file that mean nothing here; saved again
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in _standard(copy.deepcopy(DEFAULTS) | given).items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        return f"LlavaNextImageProcessor({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"

    def __call__(self, images: Any, **options: Any) -> ProcessedBatch:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Any) -> ProcessedBatch:
        """Process pictures: one, a list, or a list of lists; they come out in one row, in order.

        Args:
            images: paths, URLs, data: URIs, bytes, Pillow images, arrays or tensors, in any nesting of two levels.
            options: any option of the constructor, for this call; and ``return_tensors`` (``"pt"``, ``"np"`` or None),
                ``device``.

        Returns:
            ``pixel_values`` (M, N, C, tile, tile) float32: for each of M pictures the overview, then the grid's tiles
            row by row; N is the largest number, missing tiles are zero. ``image_sizes`` (M, 2) int64: each picture's
            own (height, width). Without ``return_tensors`` both are lists, one entry a picture; with ``do_pad=False``
            pictures keep their own numbers of tiles.

        Raises:
            ImageError: a picture is damaged, too large or ambiguous.
            FetchError: a path or URL cannot be read.
            ConfigurationError: an option does not exist or cannot be used.
        """
        check_names(options, [*DEFAULTS, *CALL_ONLY], "LlavaNextImageProcessor")
        kind = getattr(options.get("return_tensors"), "value", options.get("return_tensors"))
        if kind not in (None, "pt", "np"):
            raise ConfigurationError(f"return_tensors is {kind!r}; it is 'pt', 'np' or None.")
        device = check_device(options.get("device"))
        given = {name: value for name, value in options.items() if name in DEFAULTS and value is not None}
        chosen = _Options.from_settings(_standard(self._settings() | given))
        pictures = [
            self._load(image, chosen, number)
            for number, image in enumerate(image for sample in nest_images(images) for image in sample)
        ]
        batch = _collate(_process(pictures, chosen), [picture.size for picture in pictures], chosen, kind)
        return batch if device is None else batch.to(device)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> int:
        """Tiles of a picture of this size, the overview among them."""
        given = {name: value for name, value in (images_kwargs or {}).items() if name in DEFAULTS}
        chosen = _Options.from_settings(_standard(self._settings() | given))
        rows, cols = (-(-side // chosen.tile) for side in chosen.resolution.canvas((height, width)))
        return 1 + rows * cols

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> LlavaNextImageProcessor:
        """From a checkpoint's folder or the file itself; ``options`` override what is written there.

        Raises FetchError where there is no file, ConfigurationError for one that cannot be used.
        """
        check_names(options, DEFAULTS, "LlavaNextImageProcessor")
        settings, unused = read_settings(Path(folder), DEFAULTS)
        processor = cls(**(settings | options))
        processor.unused = unused
        return processor

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write ``preprocessor_config.json`` as transformers 4.57 and 5 read it; returns the files written."""
        return [str(path) for path in write_settings(Path(folder), self.to_dict())]

    def to_dict(self) -> dict[str, Any]:
        """The settings in transformers' words; what :meth:`save_pretrained` writes."""
        settings = self._settings()
        backend = settings.pop("backend")
        settings.pop("input_data_format")
        kind = "LlavaNextImageProcessor" + ("Fast" if backend == "torch" else "")
        return {**self.unused, **settings, "image_processor_type": kind}

    def _settings(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in DEFAULTS}

    @staticmethod
    def _load(image: Any, chosen: _Options, number: int) -> Picture:
        try:
            return to_picture(load_image(image), rgb=chosen.do_convert_rgb, order=chosen.input_order)
        except ImageError as error:
            raise ImageError(f"Picture {number}: {error}") from error


def _standard(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in the form in which they are kept and saved."""
    values = {name: value if name == "size" else standard_form(name, value) for name, value in settings.items()}
    values["size"] = _size(values["size"], square=bool(values["default_to_square"]))
    try:
        pinpoints = [[int(height), int(width)] for height, width in values["image_grid_pinpoints"]]
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"image_grid_pinpoints is {values['image_grid_pinpoints']!r}; it is a list of (height, width) pairs."
        ) from None
    if values["data_format"] != "channels_first":
        raise ConfigurationError("data_format is 'channels_last'; LLaVA-Next's tiles are channels_first.")
    return {**values, "image_grid_pinpoints": pinpoints}


def _size(value: Any, *, square: bool) -> dict[str, int]:
    if isinstance(value, int) and not square:
        value = {"shortest_edge": value}
    try:
        sides = {key: side for key, side in dict(value).items() if side is not None}
    except (TypeError, ValueError):
        sides = {}
    if set(sides) == {"shortest_edge"}:
        return {"shortest_edge": standard_form("crop_size", sides["shortest_edge"])["height"]}
    if sides and set(sides) != {"height", "width"}:
        raise ConfigurationError(f"size is {value!r}; it is {{'shortest_edge': n}} or {{'height': h, 'width': w}}.")
    form: dict[str, int] = standard_form("crop_size", sides or value)
    return form


def _process(pictures: list[Picture], chosen: _Options) -> list[Array]:
    """One array (tiles, C, tile, tile) a picture."""
    channels = {picture.channels for picture in pictures}
    if len(channels) > 1:
        raise ImageError(f"Pictures of {sorted(channels)} channels in one batch; leave do_convert_rgb on.")
    check_channels(min(channels), chosen.mean, chosen.std)
    maps = {
        unit: PixelMap.build(
            chosen.backend, rescale_factor=chosen.rescale_factor, mean=chosen.mean, std=chosen.std, floats_to_one=unit
        )
        for unit in {picture.unit for picture in pictures}
    }

    def work(picture: Picture) -> Array:
        tiles = _tiles(picture, chosen)
        if len({tile.shape for tile in tiles}) > 1:
            raise ConfigurationError(
                f"The tiles of one picture come out in different sizes, {sorted({tile.shape[:2] for tile in tiles})}. "
                "Turn do_resize and do_center_crop on, or choose image_grid_pinpoints of whole tiles."
            )
        # Bytes that nothing is done to stay bytes, as in transformers.
        plain = maps[picture.unit].is_identity and tiles[0].dtype == np.uint8
        height, width, count = tiles[0].shape
        out = np.empty((len(tiles), count, height, width), np.uint8 if plain else np.float32)
        for tile, place in zip(tiles, out, strict=True):
            maps[picture.unit].write(tile, place)
        return out

    return in_threads(work, pictures)


def _tiles(picture: Picture, chosen: _Options) -> list[Array]:
    """Overview and grid of one picture, (height, width, channels) each, before rescaling."""
    pixels = prepare(picture, chosen.backend)
    overview = as_array(resize(pixels, chosen.overview, chosen.resample, chosen.backend))
    canvas_size, fitted_size = chosen.resolution.canvas(picture.size), chosen.resolution.fitted(picture.size)
    fitted = as_array(resize(pixels, fitted_size, chosen.resample, chosen.backend))
    canvas = np.zeros((*canvas_size, fitted.shape[2]), fitted.dtype)
    top, left = ((whole - part) // 2 for whole, part in zip(canvas_size, fitted_size, strict=True))
    canvas[top : top + fitted_size[0], left : left + fitted_size[1]] = fitted
    starts = [range(0, side, chosen.tile) for side in canvas_size]
    grid = [canvas[y : y + chosen.tile, x : x + chosen.tile] for y in starts[0] for x in starts[1]]
    return [_fit_tile(tile, chosen) for tile in (overview, *grid)]


def _fit_tile(tile_HWC: Array, chosen: _Options) -> Array:
    """The second resize and the centre crop; neither changes a tile that has its size already."""
    target = chosen.resized
    if isinstance(target, int):
        short, long = sorted(tile_HWC.shape[:2])
        scaled = int(target * long / short)
        target = (scaled, target) if tile_HWC.shape[0] > tile_HWC.shape[1] else (target, scaled)
    if target is not None:
        tile_HWC = as_array(resize(tile_HWC, target, chosen.resample, chosen.backend))
    return tile_HWC if chosen.crop is None else crop_middle(tile_HWC, chosen.crop)


def _collate(tiles: list[Array], sizes: list[tuple[int, int]], chosen: _Options, kind: str | None) -> ProcessedBatch:
    most = max(len(rows) for rows in tiles)
    if chosen.do_pad:
        tiles = [np.concatenate((rows, np.zeros((most - len(rows), *rows.shape[1:]), rows.dtype))) for rows in tiles]
    if kind is None:
        as_torch = chosen.backend == "torch"
        return ProcessedBatch(
            {"pixel_values": [torch.from_numpy(rows) if as_torch else rows for rows in tiles], "image_sizes": sizes}
        )
    if len({rows.shape for rows in tiles}) > 1:
        raise ConfigurationError(
            "The pictures have different numbers of tiles; leave do_pad on, or return_tensors out."
        )
    pixels, measures = np.stack(tiles), np.array(sizes, dtype=np.int64)
    if kind == "np":
        return ProcessedBatch({"pixel_values": pixels, "image_sizes": measures})
    return ProcessedBatch({"pixel_values": torch.from_numpy(pixels), "image_sizes": torch.from_numpy(measures)})
