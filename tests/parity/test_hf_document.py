"""The code of transformers' SmolVLM page, run line by line: by our classes after ``register()``, and by transformers'.

What is put in place: the model's folder, where the picture and the video lie, the device, and for the random checkpoint
the precision (in bf16 random weights hang on every rounding; the bundled, trained model runs in the page's own bf16).
transformers decodes a video file with compiled parts of torchvision or torchcodec, which are not here: in front of its
model stands our processor then. Its own pixels of the same frames are compared in ``test_video_parity``.
"""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from smolvlm_fms.bundle import folder_of
from smolvlm_fms.hf import FmsForConditionalGeneration, register, unregister
from smolvlm_fms.hf.processors import FmsProcessor
from smolvlm_fms.hf.reference import reference_processor
from tests.tiny_models import build_checkpoint, load_peer
from tests.videos import make_video

V5 = int(transformers.__version__.split(".")[0]) >= 5

MODEL = "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"
SINGLE = """
import torch
from transformers import AutoProcessor, AutoModelForImageTextToText

processor = AutoProcessor.from_pretrained("HuggingFaceTB/SmolVLM2-256M-Video-Instruct")
model = AutoModelForImageTextToText.from_pretrained(
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    torch_dtype=torch.bfloat16,
    device_map="cuda"
)

conversation = [
    {
        "role": "user",
        "content":[
            {"type": "image", "url": "http://images.cocodataset.org/val2017/000000039769.jpg"},
            {"type": "text", "text": "Describe this image."}
        ]
    }
]

inputs = processor.apply_chat_template(
    conversation,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=torch.bfloat16)

output_ids = model.generate(**inputs, max_new_tokens=128)
generated_texts = processor.batch_decode(output_ids, skip_special_tokens=True)
print(generated_texts)


# Video
conversation = [
    {
        "role": "user",
        "content": [
            {"type": "video", "path": "/path/to/video.mp4"},
            {"type": "text", "text": "Describe this video in detail"}
        ]
    },
]

inputs = processor.apply_chat_template(
    conversation,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=torch.bfloat16)

generated_ids = model.generate(**inputs, do_sample=False, max_new_tokens=100)
generated_texts = processor.batch_decode(generated_ids, skip_special_tokens=True)
print(generated_texts[0])
"""
BATCH = """
import torch
from transformers import AutoProcessor, AutoModelForImageTextToText

processor = AutoProcessor.from_pretrained("HuggingFaceTB/SmolVLM2-256M-Video-Instruct")
model = AutoModelForImageTextToText.from_pretrained(
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
    torch_dtype=torch.bfloat16,
    device_map="cuda"
)

# Conversation for the first image
conversation1 = [
    {
        "role": "user",
        "content": [
            {"type": "image", "path": "/path/to/image.jpg"},
            {"type": "text", "text": "Describe this image."}
        ]
    }
]

# Conversation with two images
conversation2 = [
    {
        "role": "user",
        "content": [
            {"type": "image", "path": "/path/to/image.jpg"},
            {"type": "image", "path": "/path/to/image.jpg"},
            {"type": "text", "text": "What is written in the pictures?"}
        ]
    }
]

# Conversation with pure text
conversation3 = [
    {"role": "user","content": "who are you?"}
]


conversations = [conversation1, conversation2, conversation3]
inputs = processor.apply_chat_template(
    conversation,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=torch.bfloat16)

generated_ids = model.generate(**inputs, do_sample=False, max_new_tokens=100)
generated_texts = processor.batch_decode(generated_ids, skip_special_tokens=True)
print(generated_texts[0])
"""
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SmolVLM2: its template knows videos, its files say what the released ones do."""
    folder = build_checkpoint(tmp_path_factory.mktemp("document"), "smolvlm", processor=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _change(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"], padding_side="left")
    if not V5:  # its tensor processors take bicubic where Lanczos is asked for
        _change(folder / "preprocessor_config.json", resample=int(Image.Resampling.BICUBIC))
    return folder


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What stands for the page's places: a picture on a web server, the same in a file, a video in a file."""
    folder = tmp_path_factory.mktemp("media")
    values = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    for name in ("000000039769.jpg", "image.jpg"):
        Image.fromarray(values).resize((180, 120)).save(folder / name)
    (folder / "video.mp4").write_bytes(make_video(40, fps=10, size=(96, 64)))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "http://images.cocodataset.org/val2017/": f"http://127.0.0.1:{server.server_address[1]}/",
        "/path/to/": f"{folder}/",
        'device_map="cuda"': 'device_map="cpu"',
    }
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(media: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs code of the page by our classes or transformers'; returns its names and what it printed."""

    def run(code: str, folder: Path, *, ours: bool, dtype: str = "bfloat16") -> tuple[dict[str, Any], list[Any]]:
        said_by_page = code
        for said, here in {MODEL: str(folder), "bfloat16": dtype, **media}.items():
            code = code.replace(said, here)
        printed: list[Any] = []
        names: dict[str, Any] = {"print": printed.append}
        with monkeypatch.context() as patch:
            unregister()
            reference = reference_processor(folder)
            register()
            if not ours:
                load = staticmethod(lambda name, torch_dtype, **_: load_peer(name, torch_dtype))
                patch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", load)
            if not ours and "/path/to/video" not in said_by_page:
                patch.setattr(transformers.AutoProcessor, "from_pretrained", staticmethod(lambda _: reference))
            exec(code, names)
        assert isinstance(names["model"], FmsForConditionalGeneration) == ours
        assert isinstance(names["processor"], FmsProcessor) == (ours or "/path/to/video" in said_by_page)
        return names, printed

    yield run
    unregister()


def test_single_media_on_random_weights(run: Any, random_folder: Path) -> None:
    """A picture by URL, 128 tokens; a video file, 100 tokens: the same text from both implementations."""
    found, expected = (run(SINGLE, random_folder, ours=ours, dtype="float32") for ours in (True, False))
    assert found[1] == expected[1] and len(found[1]) == 2
    assert len(found[0]["generated_ids"][0]) == found[0]["inputs"]["input_ids"].shape[1] + 100
    assert found[0]["inputs"]["pixel_values"].shape[1] > 1, "the video has several frames"
    for name, value in expected[0]["inputs"].items():
        assert found[0]["inputs"][name].shape == value.shape, name


def test_a_picture_by_transformers_own_processor(run: Any, random_folder: Path) -> None:
    found, expected = (
        run(SINGLE[: SINGLE.index("# Video")], random_folder, ours=ours, dtype="float32") for ours in (True, False)
    )
    assert found[1] == expected[1] and len(found[1]) == 1
    assert torch.equal(found[0]["inputs"]["input_ids"], expected[0]["inputs"]["input_ids"])


def test_single_media_in_bf16_on_the_bundled_model(run: Any, tmp_path: Path) -> None:
    """The page as it stands, with trained weights: they answer, and the same thing."""
    video = SINGLE.index("# Video")  # the bundled template has no videos
    folder = Path(shutil.copytree(folder_of("demo"), tmp_path / "demo"))
    _change(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])  # for transformers 4
    found, expected = (run(SINGLE[:video], folder, ours=ours) for ours in (True, False))
    assert found[1] == expected[1]
    assert found[0]["model"].dtype == torch.bfloat16
    assert found[1][0][0].split("Assistant:")[1].strip()


def test_batch_mixed_media(run: Any, random_folder: Path) -> None:
    """The page's last block, which passes ``conversation`` (the video's, when its blocks run in one session)."""
    code = SINGLE[SINGLE.index("# Video") : SINGLE.index("inputs = ", SINGLE.index("# Video"))] + BATCH
    found, expected = (run(code, random_folder, ours=ours, dtype="float32") for ours in (True, False))
    assert found[1] == expected[1] and len(found[1]) == 1


def test_batch_mixed_media_as_it_is_meant(run: Any, random_folder: Path) -> None:
    """``conversations`` at once: one picture, two pictures, pure text. A batch needs padding, which the page leaves
    out, and a list of parts where transformers' template reads letters of a string.
    """
    code = BATCH.replace("    conversation,", "    conversations,\n    padding=True,")
    code = code.replace('"content": "who are you?"', '"content": [{"type": "text", "text": "who are you?"}]')
    assert "conversations,\n" in code and "[{" in code
    code = code.replace("print(generated_texts[0])", "print(generated_texts)")
    found = run(code, random_folder, ours=True, dtype="float32")
    if V5:  # which wants padding among the processor's arguments
        code = code.replace("    padding=True,", '    processor_kwargs={"padding": True},')
    expected = run(code, random_folder, ours=False, dtype="float32")
    assert found[1] == expected[1] and len(found[1][0]) == 3


def test_pure_text_in_a_string(run: Any, random_folder: Path) -> None:
    """The page's third conversation; transformers' own templating drops or reads the string as the release has it."""
    code = BATCH.replace("    conversation,", "    conversation3,")
    found = run(code, random_folder, ours=True, dtype="float32")
    assert "who are you?" in found[1][0]
