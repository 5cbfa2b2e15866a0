"""Training: fine-tune any checkpoint, or train one from nothing; resumable to the bit.

    config = TrainConfig(run="runs/circles", steps=2000, accumulate=1, precision="bfloat16")
    config.optim.lr, config.tower.lr, config.optim.schedule = 3e-4, 1e-3, "wsd"

    model = SmolVLM(SmolVLMConfig(...)); model.reset_parameters()          # or load_model(folder)
    batches = SampleBatches(dataset, batch_size=64, pad_token_id=2, workers=1)
    Trainer(config, model, batches, evaluate=evaluator, save_final=save).run()

**The data seam.** A run's data is a function from a number to a micro-batch. ``Trainer`` wants an object with

    stream(start, rank, world) -> Iterator[Batch]     micro-batches start + rank, start + rank + world, …

where the same number gives the same batch every time: nothing else has to be saved to resume. ``SampleBatches`` makes
one from a dataset: anything with ``__getitem__(index) -> Sample``. With ``__len__`` it is shuffled anew each epoch (by
the seed); without, it is endless and ``dataset[i]`` is asked for i = 0, 1, 2 …, so a generator seeds itself with i.
Datasets are read in ``workers`` processes, in order; they must be picklable then, unless ``worker_start="fork"``.

A ``Sample`` holds one conversation: ``input_ids`` (T,), ``labels`` (T,) = the token to be predicted *at* that place,
not shifted, and −100 wherever nothing is learnt (prompt, pictures), ``pixel_values`` (N, C, H, W) float32, or uint8,
which the trainer scales to −1 … 1, and ``pixel_attention_mask`` (N, H, W) where tiles have padding (None: no padding).

**A run folder** holds ``config.yaml``, ``metrics.jsonl`` (one object a step), ``samples.jsonl`` (what the model said at
each evaluation), ``checkpoints/step-…`` and, at the end, ``final/``. The same call again resumes from the newest
checkpoint. One step uses ``accumulate`` micro-batches whatever the number of processes, and its loss is the mean over
all their target tokens, so the curve does not depend on how the work is spread.
"""

from __future__ import annotations

from smolvlm_fms.training.batches import Batches, SampleBatches
from smolvlm_fms.training.config import TrainConfig
from smolvlm_fms.training.evaluate import Evaluator
from smolvlm_fms.training.samples import IGNORE, Batch, Sample, collate
from smolvlm_fms.training.trainer import Trainer, TrainResult

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "Evaluator",
    "Sample",
    "SampleBatches",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "collate",
]
