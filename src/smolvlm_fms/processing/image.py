"""``SmolVLMImageProcessor``: pictures in any form to the tiles that the vision tower reads.

    images ─▶ load, upright ─▶ RGB pixels ─▶ resize and cut (geometry) ─▶ pixel_values          (B, N, C, tile, tile)
                                                                          pixel_attention_mask  (B, N, tile, tile)

Same names, shapes, dtypes and values as transformers' class of this name. Where this one differs on purpose:

* EXIF orientation is applied to Pillow images too, not only to paths.
* Transparency is laid on white wherever it comes from (transformers drops it for paths).
* 16-bit and float greyscale files are scaled to 0…255, not clipped to white.
* Floats in 0…1 are taken as rescaled already; transformers rescales them again unless ``do_rescale=False``.
* Arrays whose channel axis is not evident raise; values outside every known range raise.
* ``get_number_of_image_patches`` gives the true grid, and 1 for a picture that is not cut.
* The mask is a view that repeats one value a tile (tiles are always whole) and takes no memory; clone it to write.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from smolvlm_fms.errors import CapacityError, ConfigurationError, ImageError
from smolvlm_fms.processing.batch import ProcessedBatch
from smolvlm_fms.processing.geometry import plan_tiles
from smolvlm_fms.processing.image_config import read_settings, write_settings
from smolvlm_fms.processing.options import CALL_ONLY, DEFAULTS, ImageOptions, check_device, check_names, standard_form
from smolvlm_fms.processing.pixels import Picture, to_picture
from smolvlm_fms.processing.resample import prepare
from smolvlm_fms.processing.sources import load_image, nest_images
from smolvlm_fms.processing.threads import available_threads, in_threads
from smolvlm_fms.processing.tiling import PixelMap, check_channels, cut_picture
from smolvlm_fms.types import TileGrid

__all__ = ["SmolVLMImageProcessor", "preprocess_images"]

Array: TypeAlias = npt.NDArray[Any]


class SmolVLMImageProcessor:
    """Pictures to tiles, for SmolVLM, SmolVLM2, Idefics3 and the Docling models.

    Every option can be given here or for one call. ``backend`` is ``"pil"`` (Pillow's pixels, to the bit: what
    ``AutoImageProcessor`` gives without torchvision, in transformers 4 in any case, and what released checkpoints were
    made with), ``"torch"`` (what it gives with torchvision under transformers 5: a few pixels in a thousand differ by a
    level or two) or ``"torch4"`` (the ``…Fast`` class of transformers 4: bicubic in place of Lanczos).

    Options beyond transformers': ``backend``; ``detail`` (``"low"`` sends one tile, ``"auto"`` does not blow small
    pictures up, ``"high"`` is exact); ``do_center_crop`` with ``crop_size``, after the first resize, off by default.
    """

    model_input_names = ("pixel_values", "pixel_attention_mask")

    do_convert_rgb: bool
    do_resize: bool
    size: dict[str, int]
    resample: int
    do_image_splitting: bool
    max_image_size: dict[str, int]
    do_center_crop: bool
    crop_size: dict[str, int] | None
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]
    do_pad: bool
    backend: str
    detail: str
    return_row_col_info: bool
    data_format: str
    input_data_format: str | None

    def __init__(self, **options: Any) -> None:
        """
        Raises:
            ConfigurationError: an option does not exist or has a value that cannot be used.
        """
        check_names(options, DEFAULTS)
        self.unused: dict[str, Any] = {}  # fields of a checkpoint's file that mean nothing here; saved again
        given = {name: value for name, value in options.items() if value is not None}
        for name, value in (copy.deepcopy(DEFAULTS) | given).items():
            setattr(self, name, standard_form(name, value))

    def __repr__(self) -> str:
        return f"SmolVLMImageProcessor({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"

    def __call__(self, images: Any, **options: Any) -> ProcessedBatch:
        """See :meth:`preprocess`."""
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Any) -> ProcessedBatch:
        """Process one picture, one sample of pictures, or a batch of samples.

        Args:
            images: a picture (path, URL, data: URI, bytes, Pillow image, array, tensor), a list of pictures (one
                sample), or a list of such lists (some may be empty).
            options: any option of the constructor, for this call; and ``return_tensors`` (``"pt"``, ``"np"`` or None),
                ``device``.

        Returns:
            ``pixel_values`` (B, N, C, tile, tile) float32 and ``pixel_attention_mask`` (B, N, tile, tile) int64, where
            N is the largest number of tiles in a sample and missing tiles are zero; with ``return_row_col_info`` also
            ``rows`` and ``cols``, a list of integers a sample, one a picture. With ``do_pad=False`` there is no mask,
            and without ``return_tensors`` samples keep their own numbers of tiles (lists).

        Raises:
            ImageError: a picture is damaged, too large or ambiguous.
            FetchError: a path or URL cannot be read.
            ConfigurationError: an option does not exist or cannot be used.
            CapacityError: the batch does not fit into memory.
        """
        chosen = self._resolve(options)
        samples = [
            [self._load(image, chosen, (i, j)) for j, image in enumerate(sample)]
            for i, sample in enumerate(nest_images(images))
        ]
        grids = [[self._plan(picture.size, chosen) for picture in sample] for sample in samples]
        tiles = _fill(samples, grids, chosen)
        batch = _collate(tiles, grids, chosen, options.get("return_tensors"), check_device(options.get("device")))
        if chosen.return_row_col_info:
            batch["rows"] = [[grid.rows for grid in sample] for sample in grids]
            batch["cols"] = [[grid.cols for grid in sample] for sample in grids]
        return batch

    def plan(self, height: int, width: int, **options: Any) -> TileGrid:
        """How a picture of this size (upright, in pixels) will be resized and cut; no pixels needed."""
        return self._plan((height, width), self._resolve(options))

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[int, int, int]:
        """(tiles, rows, cols) of a picture of this size. A "patch" here is a tile, in transformers' word."""
        known = {name: value for name, value in (images_kwargs or {}).items() if name in DEFAULTS}
        grid = self.plan(height, width, **known)
        return grid.count, grid.rows, grid.cols

    @property
    def pixel_map(self) -> PixelMap:
        """What rescaling and normalising make of bytes."""
        return _pixel_map(self._resolve({}))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> SmolVLMImageProcessor:
        """From a checkpoint's folder (or the file itself): ``preprocessor_config.json``, or the ``image_processor`` in
        ``processor_config.json``, where transformers 5 puts it; ``options`` override what is written there.

        Raises:
            FetchError: there is no such file.
            ConfigurationError: the file is no JSON object, or holds values that cannot be used.
        """
        check_names(options, DEFAULTS)
        settings, unused = read_settings(Path(folder))
        processor = cls(**(settings | options))
        processor.unused = unused
        return processor

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write ``preprocessor_config.json`` as transformers 4.57 and 5 read it; returns the files written.

        A ``processor_config.json`` that already holds an image processor is brought up to date as well, because
        transformers 5 reads that one first.
        """
        return [str(path) for path in write_settings(Path(folder), self.to_dict())]

    def to_dict(self) -> dict[str, Any]:
        """The settings in transformers' words; what :meth:`save_pretrained` writes."""
        settings = self._settings()
        backend = settings.pop("backend")
        for name in ("return_row_col_info", "input_data_format"):
            settings.pop(name)
        for name in ("do_center_crop", "crop_size", "detail", "data_format"):
            if settings[name] == DEFAULTS[name]:
                settings.pop(name)  # transformers' classes have no such setting; say nothing unless it matters
        kind = str(self.unused.get("image_processor_type", "SmolVLMImageProcessor")).removesuffix("Fast")
        kind = kind.removesuffix("Pil")
        return {**self.unused, **settings, "image_processor_type": kind + ("" if backend == "pil" else "Fast")}

    def _settings(self) -> dict[str, Any]:
        return {name: copy.deepcopy(getattr(self, name)) for name in DEFAULTS}

    def _resolve(self, options: Mapping[str, Any]) -> ImageOptions:
        check_names(options, [*DEFAULTS, *CALL_ONLY])
        tensors = getattr(options.get("return_tensors"), "value", options.get("return_tensors"))
        if tensors not in (None, "pt", "np"):
            raise ConfigurationError(f"return_tensors is {tensors!r}; it is 'pt', 'np' or None.")
        given = {name: value for name, value in options.items() if name in DEFAULTS and value is not None}
        return ImageOptions.from_settings(self._settings() | given)

    @staticmethod
    def _load(image: Any, chosen: ImageOptions, place: tuple[int, int]) -> Picture:
        try:
            return to_picture(load_image(image), rgb=chosen.do_convert_rgb, order=chosen.input_order)
        except ImageError as error:
            raise ImageError(f"Picture {place[1]} of sample {place[0]}: {error}") from error

    @staticmethod
    def _plan(size: tuple[int, int], chosen: ImageOptions) -> TileGrid:
        return plan_tiles(
            *size,
            size=chosen.size,
            tile=chosen.tile,
            split=chosen.do_image_splitting,
            crop=chosen.crop,
            detail=chosen.detail,
        )


def preprocess_images(images: Any, **options: Any) -> ProcessedBatch:
    """One call from pictures to the whole dictionary: ``pixel_values``, ``pixel_attention_mask``, ``rows``, ``cols``.

    ``options`` are those of :class:`SmolVLMImageProcessor`; tensors come back unless ``return_tensors`` says otherwise.
    """
    call = {"return_tensors": "pt", "return_row_col_info": True} | options
    settings = {name: value for name, value in call.items() if name not in CALL_ONLY}
    return SmolVLMImageProcessor(**settings)(images, **{name: call[name] for name in CALL_ONLY if name in call})


def _fill(samples: list[list[Picture]], grids: list[list[TileGrid]], chosen: ImageOptions) -> list[Array]:
    """One array of (tiles, C, tile, tile) a sample. With ``do_pad`` they are rows of one array, missing tiles zero."""
    channels = {picture.channels for sample in samples for picture in sample}
    if len(channels) > 1:
        raise ImageError(f"Pictures of {sorted(channels)} channels in one batch; leave do_convert_rgb on.")
    check_channels(min(channels), chosen.mean, chosen.std)
    counts = [sum(grid.count for grid in sample) for sample in grids]
    maps = {unit: _pixel_map(chosen, unit) for unit in {picture.unit for sample in samples for picture in sample}}
    padded = chosen.do_pad and len(set(counts)) > 1
    # Bytes that nothing is done to stay bytes, as in transformers' Pillow processor.
    plain = chosen.backend == "pil" and not padded and all(each.is_identity for each in maps.values())
    tiles = _allocate(
        counts, (min(channels), chosen.tile, chosen.tile), np.uint8 if plain else np.float32, chosen.do_pad
    )

    pictures = sum(len(sample) for sample in samples)
    # Whole pictures side by side; a single one is divided among the threads instead.
    outer = available_threads() if pictures > 1 else 1
    inner = 1 if pictures > 1 else available_threads()

    def work(job: tuple[Picture, TileGrid, Array]) -> None:
        picture, grid, out = job
        pixels = prepare(picture, chosen.backend)
        cut = cut_picture(pixels, grid, chosen.resample, chosen.backend, inner)
        in_threads(lambda index: maps[picture.unit].write(cut[index], out[index]), range(grid.count), inner)

    jobs = []
    for sample, plans, rows in zip(samples, grids, tiles, strict=True):
        start = 0
        for picture, grid in zip(sample, plans, strict=True):
            jobs.append((picture, grid, rows[start : start + grid.count]))
            start += grid.count
        rows[start:] = 0
    in_threads(work, jobs, outer)
    return tiles


def _pixel_map(chosen: ImageOptions, unit: bool = False) -> PixelMap:
    return PixelMap.build(
        chosen.backend,
        rescale_factor=chosen.rescale_factor,
        mean=chosen.mean,
        std=chosen.std,
        floats_to_one=unit,
    )


def _allocate(counts: list[int], tile: tuple[int, int, int], dtype: type, pad: bool) -> list[Array]:
    # NumPy asks the kernel for huge pages, torch does not: filling fresh memory is twice as fast.
    try:
        if pad:
            return list(np.empty((len(counts), max(counts), *tile), dtype))
        return [np.empty((count, *tile), dtype) for count in counts]
    except MemoryError as error:
        raise CapacityError(
            f"The batch has {max(counts)} tiles of {tile[1]}×{tile[2]} in each of {len(counts)} samples, which do not "
            "fit into memory. Send fewer pictures at a time, or lower size['longest_edge']."
        ) from error


def _collate(
    tiles: list[Array],
    grids: list[list[TileGrid]],
    chosen: ImageOptions,
    return_tensors: Any,
    device: torch.device | None,
) -> ProcessedBatch:
    kind = getattr(return_tensors, "value", return_tensors)
    pad, equal = chosen.do_pad, len({len(rows) for rows in tiles}) == 1
    if not pad and not equal and kind is not None:
        raise ConfigurationError("The samples have different numbers of tiles; leave do_pad on, or return_tensors out.")
    order = (0, 2, 3, 1)
    if chosen.channels_last:
        tiles = [rows.transpose(order) for rows in tiles]
    as_torch = kind == "pt" or (kind is None and chosen.backend != "pil")
    if not pad and kind is None:
        values: Any = [[torch.from_numpy(tile) if as_torch else tile for tile in rows] for rows in tiles]
        return _on(ProcessedBatch({"pixel_values": values}), device)
    base = tiles[0].base if pad and not chosen.channels_last else None
    pixels = base if base is not None else np.stack(tiles)
    data: dict[str, Any] = {"pixel_values": torch.from_numpy(pixels) if as_torch else pixels}
    if pad:
        counts = torch.tensor([sum(grid.count for grid in sample) for sample in grids])
        present = torch.arange(int(counts.max()))[None] < counts[:, None]
        mask = present.long()[..., None, None].expand(-1, -1, chosen.tile, chosen.tile)
        data["pixel_attention_mask"] = mask if as_torch else mask.numpy()
    return _on(ProcessedBatch(data), device)


def _on(batch: ProcessedBatch, device: torch.device | None) -> ProcessedBatch:
    return batch if device is None else batch.to(device)
