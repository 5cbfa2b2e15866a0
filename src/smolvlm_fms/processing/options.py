"""The image processor's options: their names, defaults, forms and checks.

Names and defaults are those of transformers' ``SmolVLMImageProcessor``; every released checkpoint overrides ``size``
and ``max_image_size`` in its ``preprocessor_config.json``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from PIL import Image

from smolvlm_fms.errors import ConfigurationError
from smolvlm_fms.processing.geometry import Detail, Size
from smolvlm_fms.processing.pixels import ChannelOrder
from smolvlm_fms.processing.resample import Backend

__all__ = ["CALL_ONLY", "DEFAULTS", "ImageOptions", "check_names", "standard_form"]

#: What ``SmolVLMImageProcessor()`` is when it is given nothing.
DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"longest_edge": 4 * 364},
    "resample": int(Image.Resampling.LANCZOS),
    "do_image_splitting": True,
    "max_image_size": {"longest_edge": 364},
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_pad": True,
    "backend": "pil",
    "detail": "high",
    "return_row_col_info": False,
    "data_format": "channels_first",
    "input_data_format": None,
}
#: Arguments of a call that are no settings of the processor. The last four are taken because transformers takes them
#: for every image processor; they change nothing here, nor for SmolVLM there.
CALL_ONLY = ("return_tensors", "device", "default_to_square", "disable_grouping", "pad_size", "image_seq_length")

_SWITCHES = [name for name, value in DEFAULTS.items() if isinstance(value, bool)]


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """One call's options, checked and in one form."""

    do_convert_rgb: bool
    size: Size
    resample: Image.Resampling
    do_image_splitting: bool
    tile: int
    crop: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    do_pad: bool
    backend: Backend
    detail: Detail
    return_row_col_info: bool
    channels_last: bool
    input_order: ChannelOrder | None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImageOptions:
        """From settings in any form that transformers takes.

        Raises:
            ConfigurationError: a value is missing, contradictory or of the wrong kind; names the setting.
        """
        s = {name: standard_form(name, value) for name, value in settings.items()}
        for name, needed in (("do_resize", "size"), ("do_center_crop", "crop_size"), ("do_rescale", "rescale_factor")):
            if s[name] and s[needed] is None:
                raise ConfigurationError(f"{name} is on and {needed} is not given.")
        if s["do_normalize"] and (s["image_mean"] is None or s["image_std"] is None):
            raise ConfigurationError("do_normalize is on; it needs image_mean and image_std.")
        crop = s["crop_size"]
        return cls(
            do_convert_rgb=s["do_convert_rgb"],
            size=_target(s["size"]) if s["do_resize"] else None,
            resample=Image.Resampling(s["resample"]),
            do_image_splitting=s["do_image_splitting"],
            tile=s["max_image_size"]["longest_edge"],
            crop=(crop["height"], crop["width"]) if s["do_center_crop"] else None,
            rescale_factor=s["rescale_factor"] if s["do_rescale"] else None,
            mean=tuple(s["image_mean"]) if s["do_normalize"] else None,
            std=tuple(s["image_std"]) if s["do_normalize"] else None,
            do_pad=s["do_pad"],
            backend=s["backend"],
            detail=s["detail"],
            return_row_col_info=s["return_row_col_info"],
            channels_last=s["data_format"] == "channels_last",
            input_order=s["input_data_format"],
        )


def check_names(names: Iterable[str], known: Iterable[str], owner: str = "SmolVLMImageProcessor") -> None:
    """Refuse options that do not exist, with the nearest one that does."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Known: {', '.join(sorted(known))}."
            raise ConfigurationError(f"{owner} has no option {name!r}.{hint}")


def standard_form(name: str, value: Any) -> Any:
    """One setting in the form in which it is kept and saved: plain numbers, lists and dictionaries."""
    if name in _SWITCHES:
        if not isinstance(value, bool):
            raise ConfigurationError(f"{name} is {value!r}; it is True or False.")
        return value
    if name in _FORMS and value is not None:
        return _FORMS[name](name, value)
    if value is None and name in ("resample", "max_image_size", "backend", "detail", "data_format"):
        raise ConfigurationError(f"{name} cannot be None.")
    return value


def _size(name: str, value: Any) -> dict[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value}
    elif isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value):
        value = {"height": value[0], "width": value[1]}
    try:
        sides = {key: side for key, side in dict(value).items() if side is not None}
    except (TypeError, ValueError):
        sides = {}
    if set(sides) not in ({"longest_edge"}, {"height", "width"}):
        raise ConfigurationError(f"{name} is {value!r}; it is {{'longest_edge': n}} or {{'height': h, 'width': w}}.")
    if name == "crop_size" and "height" not in sides:
        raise ConfigurationError(f"crop_size is {value!r}; it is {{'height': h, 'width': w}}, or a number for both.")
    return {key: _side(name, side) for key, side in sides.items()}


def _tile_size(name: str, value: Any) -> dict[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"longest_edge": _side(name, value)}
    sides = _size(name, value)
    if "height" in sides and sides["height"] != sides["width"]:
        raise ConfigurationError(f"{name} is {value!r}; tiles are square.")
    return {"longest_edge": sides.get("longest_edge", sides.get("height", 0))}


def _side(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1 << 16:
        raise ConfigurationError(f"{name} has a side of {value!r}; sides are whole numbers from 1 to 65,536.")
    return value


def _resample(name: str, value: Any) -> int:
    value = getattr(value, "value", value)  # an enumeration: Pillow's holds a number, torchvision's a name
    if isinstance(value, str):
        named = {each.name.lower(): int(each) for each in Image.Resampling} | {"nearest-exact": 0}
        value = named.get(value.lower(), value)
    if not isinstance(value, int) or isinstance(value, bool) or value not in [int(each) for each in Image.Resampling]:
        raise ConfigurationError(
            f"{name} is {value!r}; it is a number of PIL.Image.Resampling (1 is Lanczos) or one of "
            f"{', '.join(each.name.lower() for each in Image.Resampling)}."
        )
    return value


def _channel_values(name: str, value: Any) -> list[float]:
    values = [value] if isinstance(value, int | float) else list(value) if isinstance(value, Iterable) else []
    if not values or not all(isinstance(each, int | float) and math.isfinite(each) for each in values):
        raise ConfigurationError(f"{name} is {value!r}; it is a number, or one number for each channel.")
    if name == "image_std" and not all(values):
        raise ConfigurationError("image_std holds a zero, which nothing can be divided by.")
    return [float(each) for each in values]


def _factor(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value == 0:
        raise ConfigurationError(f"{name} is {value!r}; it is a number other than zero, usually 1/255.")
    return float(value)


def _choice(name: str, value: Any) -> str:
    value = getattr(value, "value", value)
    choices = _CHOICES[name]
    if value not in choices:
        raise ConfigurationError(f"{name} is {value!r}; it is one of {', '.join(map(repr, choices))}.")
    return str(value)


_CHOICES: dict[str, tuple[str, ...]] = {
    "backend": get_args(Backend),
    "detail": get_args(Detail),
    "data_format": ("channels_first", "channels_last"),
    "input_data_format": get_args(ChannelOrder),
}
_FORMS = {
    "size": _size,
    "crop_size": _size,
    "max_image_size": _tile_size,
    "resample": _resample,
    "image_mean": _channel_values,
    "image_std": _channel_values,
    "rescale_factor": _factor,
    **dict.fromkeys(_CHOICES, _choice),
}


def _target(size: dict[str, int]) -> Size:
    return size["longest_edge"] if "longest_edge" in size else (size["height"], size["width"])


def check_device(device: Any) -> torch.device | None:
    """A device that torch knows, or None."""
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"device is {device!r}: {error}") from error
