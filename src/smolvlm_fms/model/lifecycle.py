"""What every model does once its weights are in place."""

from __future__ import annotations

from typing import Any

from smolvlm_fms.errors import CheckpointError

__all__ = ["finish"]


def finish(model: Any) -> None:
    """Tie the head where configured and compute RoPE tables; raises CheckpointError if weights are missing.

    FMS's ``get_model`` calls this through ``post_init``. It builds models without memory and gives memory to the
    tensors that its checkpoint holds; whatever is left without would be filled with what the memory held before. A
    model that is wholly without memory was asked for that way (``device_type="meta"``).
    """
    model.text_model.tie()
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing and len(missing) < len(list(model.parameters())):
        raise CheckpointError(
            f"The checkpoint does not hold all tensors of this model. {len(missing)} missing: "
            f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}."
        )
    model.text_model.base_model.prepare_rope()
