"""DocTags, the markup that Docling checkpoints write, made fit for ``docling-core`` and turned into a document.

What a model writes is cut where its budget ends, lies partly outside of any element, or is no markup at all. docling-
core drops such text without a word; ``tidy`` puts it into elements first, so that nothing that was read gets lost.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from smolvlm_fms.errors import InputError, MissingDependencyError

__all__ = ["FORMATS", "build_document", "export", "is_markup", "join_pages", "require_docling", "tidy"]

FORMATS = ("md", "html", "json", "doctags")

_ELEMENTS = (
    "title", "text", "paragraph", "section_header_level_[1-6]", "page_header", "page_footer", "footnote", "caption",
    "formula", "code", "picture", "chart", "otsl", "ordered_list", "unordered_list", "list_item", "inline",
    "document_index", "checkbox_selected", "checkbox_unselected", "key_value_region",
)  # fmt: skip
_TAG = re.compile(rf"<(/?)({'|'.join(_ELEMENTS)})>")
_LISTS = ("ordered_list", "unordered_list")
_TABLES = ("otsl", "chart", "document_index")
_MAY_HOLD = {
    "ordered_list": ("list_item",),
    "unordered_list": ("list_item",),
    "list_item": ("inline", "formula", "code", "text"),
    "inline": ("text", "formula", "code"),
    "otsl": ("caption",),
    "document_index": ("caption",),
    "chart": ("caption", "otsl"),
    "picture": ("caption",),
    "code": ("caption",),
    "formula": ("caption",),
}
"""Which elements stand inside which; where any other begins, the open ones have ended. Lists in lists become lists one
after the other, and a picture's table one of its own: docling-core would lose their text."""

_WRAPPING = re.compile(r"</?doctag>|<end_of_utterance>|<page_break>|<\|[a-z_]+\|>")
_LOCATION = re.compile(r"<loc_\d+>")
_CELL = r"<(?:[ful]cel|ecel|xcel|ched|rhed|srow|nl)>"
_INNER = {
    **dict.fromkeys(_TABLES, _CELL),
    "code": r"<_[^<>\s]+_>",
    "picture": r"<[a-z]+(?:_[a-z]+)*>|</smiles>",
    "chart": rf"{_CELL}|<[a-z]+(?:_[a-z]+)*>",
    "key_value_region": r"</?(?:key|value|link)_\d+>",
}
"""Markup of an element beside locations: cells, a code's language, a picture's kind …"""
_SPANS = ("<lcel>", "<ucel>", "<xcel>")
_KEY = re.compile(r"<(?:key|value)_\d+>")
_BOX = re.compile("".join(r"<loc_(\d+)>" for _ in range(4)))
_STEPS = 500  # locations count 1/500 of the page's width or height
_ANGLE = "\ue000"  # private use: stands for a "<" that is text while docling-core looks for tags


def is_markup(text: str) -> bool:
    """Whether there is any DocTags element in a model's answer."""
    return _TAG.search(text) is not None


def tidy(text: str) -> str:
    """One page of DocTags with every element closed, list items in lists, tables of full rows, and loose text in
    ``<text>`` elements.

    The ``<doctag>`` around the page is left out. Well-formed pages come back as they are, but for white space between
    elements.
    """
    return _tidy(text).replace(_ANGLE, "<")


def _tidy(text: str) -> str:
    """``tidy``, with every "<" that is text hidden: docling-core would drop ``<int>`` out of ``vector<int>``."""
    text = _BOX.sub(_upright_box, _WRAPPING.sub("", text))
    out: list[str] = []
    open_tags: list[str] = []
    held, at = "", 0
    for found in _TAG.finditer(text):
        tag = found[2].replace("paragraph", "text")
        held += text[at : found.start()]
        at = found.end()
        if found[1] and tag not in open_tags:  # closes nothing; in code it may belong to a page about HTML
            held += found[0] if open_tags[-1:] == ["code"] else ""
            continue
        _put(out, open_tags, held)
        held = ""
        if found[1]:
            _close(out, open_tags, tag)
        else:
            _begin(out, open_tags, tag, text[at:].lstrip())
    _put(out, open_tags, held + text[at:])
    if open_tags:
        _close(out, open_tags, open_tags[0])
    return "".join(out)


def _put(out: list[str], open_tags: list[str], text: str) -> None:
    """Add text to the innermost element; outside of all of them, in one of its own."""
    inside = open_tags[-1] if open_tags else ""
    markup = re.compile(f"({'|'.join(filter(None, (_LOCATION.pattern, _INNER.get(inside))))})")
    pieces = markup.split(text)
    pieces[::2] = [piece.replace("<", _ANGLE) for piece in pieces[::2]]
    text = "".join(pieces)
    if inside == "caption":
        text = " ".join(text.split())  # docling-core finds captions of a single line only
    if inside in _TABLES:
        text = _full_rows(text)
    blank = not _LOCATION.sub("", text).strip()
    alone = inside in ("picture", "inline") or (inside == "key_value_region" and not _KEY.search(text))
    if alone and (words := " ".join("".join(pieces[::2]).split())):
        out.append("".join(pieces[1::2]))  # of these, docling-core reads nothing but what is in elements
        _close(out, open_tags, inside)
        return _put(out, open_tags, words)
    if inside and (blank or inside not in _LISTS):
        out.append(text)
    elif inside:
        out.append(f"<list_item>{text.strip()}</list_item>")
    elif not blank:
        out.append(f"<text>{text.strip()}</text>\n")


def _upright_box(found: re.Match[str]) -> str:
    """A box with an area on the page: docling-core crops pictures and fails at others."""
    left, top, right, bottom = (min(int(one), _STEPS) for one in found.groups())
    left, right = min(left, right, _STEPS - 1), max(left, right)
    top, bottom = min(top, bottom, _STEPS - 1), max(top, bottom)
    box = (left, top, max(right, left + 1), max(bottom, top + 1))
    return "".join(f"<loc_{one}>" for one in box)


def _full_rows(text: str) -> str:
    """Cells without text as empty ones, and all rows of one length: docling-core takes the next tag for such a cell's
    text, and fails at a cell that spans rows of different lengths."""
    pieces = re.split(f"({_CELL})", text)
    head, cells = pieces[0], list(zip(pieces[1::2], pieces[2::2], strict=True))
    if words := re.sub(r"<[^>]*>", "", head).strip():
        head, cells = head.replace(words, ""), [("<fcel>", words), ("<nl>", ""), *cells]
    rows: list[list[str]] = [[]]
    for tag, content in cells:
        words = _LOCATION.sub("", content).strip()
        if tag == "<nl>":
            rows.append([f"<fcel>{content}"] if words else [])
        elif tag in _SPANS:
            rows[-1].append(f"<fcel>{content}" if words else tag)
        else:
            rows[-1].append(f"{'<fcel>' if tag == '<ecel>' else tag}{content}" if words else "<ecel>")
    if not rows[-1]:
        rows.pop()
    width = max(map(len, rows), default=0)
    return head + "".join("".join(row) + "<ecel>" * (width - len(row)) + "<nl>" for row in rows)


def _begin(out: list[str], open_tags: list[str], tag: str, following: str) -> None:
    while open_tags and tag not in _MAY_HOLD.get(open_tags[-1], ()):
        _close(out, open_tags, open_tags[-1])
    if tag == "list_item" and not open_tags:  # alone, docling-core would not see it
        out.append("<unordered_list>")
        open_tags.append("unordered_list")
    out.append(f"<{tag}>")
    open_tags.append(tag)
    if tag == "chart" and not _BOX.match(following):  # docling-core leaves out charts without a place
        out.append(f"<loc_0><loc_0><loc_{_STEPS}><loc_{_STEPS}>")


def _close(out: list[str], open_tags: list[str], tag: str) -> None:
    if tag not in open_tags:
        return
    while True:
        last = open_tags.pop()
        out.append(f"</{last}>")
        if last == tag:
            break
    if not open_tags:
        out.append("\n")


def join_pages(pages: Mapping[int, str]) -> str:
    """Tidy pages as one DocTags text, as docling-core writes and reads documents of several pages."""
    return "<doctag>" + "\n<page_break>\n".join(tidy(pages[number]).strip() for number in sorted(pages)) + "</doctag>\n"


def build_document(
    pages: Mapping[int, str],
    sizes: Mapping[int, tuple[float, float]],
    name: str,
    *,
    picture_of: Callable[[int], Image.Image] | None = None,
) -> Any:
    """A ``DoclingDocument`` of DocTags by page number.

    sizes: width and height of each page; boxes are in these units. picture_of: draws a page; then every picture
    element carries its part of the page (for HTML and JSON, which grow by it).

    A page that docling-core cannot take becomes plain text rather than failing the document. Raises
    MissingDependencyError without docling-core.
    """
    docling = require_docling()
    last = max(pages, default=0)
    sources = [_page(docling, pages.get(number, "")) for number in range(1, last + 1)]
    document = docling.DoclingDocument.load_from_doctags(docling.DocTagsDocument(pages=sources), document_name=name)
    for number in set(range(1, last + 1)) - set(pages):
        del document.pages[number]
    _scale(document, sizes)
    picture_of = picture_of and functools.lru_cache(maxsize=1)(picture_of)  # pictures of a page follow each other
    for picture in document.pictures:
        seen = picture_of is not None and picture.prov
        picture.image = _crop(docling, picture, sizes, picture_of) if seen else None
    written = document.model_dump_json(by_alias=True)
    if _ANGLE in written:
        document = docling.DoclingDocument.model_validate_json(written.replace(_ANGLE, "<"))
    return document


def _scale(document: Any, sizes: Mapping[int, tuple[float, float]]) -> None:
    """From the blank pages' steps to the pages' own units."""
    for number, page in document.pages.items():
        page.image = None
        page.size.width, page.size.height = sizes[number]
    regions = document.key_value_items
    items = [*document.texts, *document.tables, *document.pictures, *regions]
    places = [place for item in items for place in item.prov]
    places += [cell.prov for region in regions for cell in region.graph.cells if cell.prov is not None]
    for place in places:
        width, height = sizes.get(place.page_no, (_STEPS, _STEPS))
        place.bbox = place.bbox.resize_by_scale(width / _STEPS, height / _STEPS)


def export(pages: Mapping[int, str], document: Any, to: str) -> str:
    """A document as ``"md"``, ``"html"``, ``"json"`` or ``"doctags"`` text (which needs ``pages`` alone)."""
    if to == "doctags":
        return join_pages(pages)
    if to == "json":
        return str(document.model_dump_json(indent=1, by_alias=True, exclude_none=True)) + "\n"
    from docling_core.types.doc.base import ImageRefMode

    mode = ImageRefMode.EMBEDDED if any(picture.image for picture in document.pictures) else ImageRefMode.PLACEHOLDER
    if to == "md":
        return str(document.export_to_markdown(image_mode=mode)).rstrip("\n") + "\n"
    if to == "html":
        return str(document.export_to_html(image_mode=mode)).rstrip("\n") + "\n"
    raise InputError(f"Documents are written as {', '.join(FORMATS)}; {to!r} came.")


def require_docling() -> Any:
    """docling-core's document module; raises MissingDependencyError without it."""
    try:
        from docling_core.types.doc import document
    except ImportError as error:
        raise MissingDependencyError(
            "Markdown, HTML and JSON need docling-core: pip install 'smolvlm-fms[docling]'. --to doctags works without."
        ) from error
    return document


def _page(docling: Any, text: str) -> Any:
    # docling-core takes a page's size from its picture, and without one leaves out the boxes of list items. A blank
    # one-bit picture of one pixel a step costs nothing.
    blank = Image.new("1", (_STEPS, _STEPS))
    page = docling.DocTagsPage(tokens=_tidy(text), image=blank)
    try:
        docling.DoclingDocument.load_from_doctags(docling.DocTagsDocument(pages=[page]), document_name="page")
    except Exception:  # spans that lead nowhere …: whatever a model can write
        plain = re.sub(r"</?[a-z_]+[0-9]*>", " ", text).replace("<", _ANGLE)
        page = docling.DocTagsPage(tokens=f"<text>{' '.join(plain.split())}</text>", image=blank)
    return page


def _crop(docling: Any, picture: Any, sizes: Mapping[int, tuple[float, float]], picture_of: Any) -> Any:
    box, number = picture.prov[0].bbox, picture.prov[0].page_no
    width, height = sizes[number]
    page = picture_of(number)
    across, down = page.width / width, page.height / height
    edges = (int(box.l * across), int(box.t * down), round(box.r * across), round(box.b * down))
    if edges[0] >= edges[2] or edges[1] >= edges[3]:
        return None
    return docling.ImageRef.from_pil(image=page.crop(edges), dpi=round(72 * across))
