"""DocTags as Docling checkpoints write them, cut and muddled as small models do, to Markdown, HTML and JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smolvlm_fms.documents.doctags import build_document, export, is_markup, join_pages, tidy
from smolvlm_fms.errors import InputError

PAGE = r"""<doctag><page_header><loc_60><loc_12><loc_440><loc_20>Annual report 2024</page_header>
<section_header_level_1><loc_44><loc_40><loc_300><loc_52>1 Results</section_header_level_1>
<text><loc_44><loc_60><loc_456><loc_96>Revenue grew by 12 % (p < 0.05), costs fell; see Table 1.</text>
<unordered_list><list_item><loc_50><loc_100><loc_456><loc_108>First item</list_item>
<list_item><loc_50><loc_110><loc_456><loc_118>Second item</list_item>
</unordered_list>
<otsl><loc_44><loc_130><loc_456><loc_190><ched>Region<ched>2023<ched>2024<nl><fcel>North<fcel>10<fcel>12<nl><fcel>South<fcel>7<ecel><nl><caption><loc_44><loc_192><loc_300><loc_200>Table 1: Revenue</caption></otsl>
<picture><loc_44><loc_210><loc_244><loc_310><bar_chart><caption><loc_44><loc_312><loc_244><loc_320>Figure 1: Growth</caption></picture>
<formula><loc_44><loc_330><loc_456><loc_350>g = \frac{r_{2024}}{r_{2023}} - 1</formula>
<code><loc_44><loc_360><loc_456><loc_390><_Python_>def growth(new, old):
    return new / old - 1</code>
<page_footer><loc_240><loc_480><loc_260><loc_488>7</page_footer>
</doctag>"""  # noqa: E501
SIZE = (600.0, 800.0)


def markdown(text: str) -> str:
    return export({1: text}, build_document({1: text}, {1: SIZE}, "page"), "md")


def test_a_page_becomes_markdown() -> None:
    assert markdown(PAGE) == (
        "## 1 Results\n\n"
        "Revenue grew by 12 % (p &lt; 0.05), costs fell; see Table 1.\n\n"
        "- First item\n- Second item\n\n"
        "Table 1: Revenue\n\n"
        "| Region   |   2023 |   2024 |\n"
        "|----------|--------|--------|\n"
        "| North    |     10 |     12 |\n"
        "| South    |      7 |        |\n\n"
        "Figure 1: Growth\n\n<!-- image -->\n\nBar chart\n\n"
        r"$$g = \frac{r_{2024}}{r_{2023}} - 1$$" + "\n\n"
        "```\ndef growth(new, old):\n    return new / old - 1\n```\n"
    )


def test_a_page_becomes_html_and_json_with_places() -> None:
    document = build_document({1: PAGE}, {1: SIZE}, "report")
    html = export({1: PAGE}, document, "html")
    assert "<td>North</td>" in html and "<h2>1 Results</h2>" in html and "<math" in html and "<li>First item" in html
    fields = json.loads(export({1: PAGE}, document, "json"))
    assert fields["schema_name"] == "DoclingDocument" and fields["name"] == "report"
    assert fields["pages"]["1"]["size"] == {"width": 600.0, "height": 800.0}
    assert "image" not in fields["pages"]["1"]
    labels = [text["label"] for text in fields["texts"]]
    expected = ["page_header", "section_header", "text", "list_item", "list_item", "caption", "caption", "formula"]
    assert labels == [*expected, "code", "page_footer"]
    item = fields["texts"][3]["prov"][0]
    assert item["page_no"] == 1
    assert [item["bbox"][side] for side in "ltrb"] == pytest.approx([60.0, 160.0, 547.2, 172.8])
    assert fields["texts"][8]["code_language"] == "Python"
    assert fields["tables"][0]["data"]["num_cols"] == 3
    assert fields["pictures"][0]["meta"]["classification"]["predictions"][0]["class_name"] == "bar_chart"


def test_pages_keep_their_numbers_and_read_back() -> None:
    from docling_core.types.doc.document import DoclingDocument, DocTagsDocument

    pages = {2: PAGE, 4: "<doctag><text><loc_1><loc_2><loc_3><loc_4>Last words</text></doctag>"}
    document = build_document(pages, {2: SIZE, 4: (300.0, 200.0)}, "report")
    assert sorted(document.pages) == [2, 4]
    assert document.pages[4].size.width == 300.0
    assert document.texts[-1].prov[0].page_no == 4
    text = join_pages(pages)
    assert text.count("<doctag>") == text.count("</doctag>") == text.count("<page_break>") == 1
    again = DoclingDocument.load_from_doctags(DocTagsDocument.from_multipage_doctags_and_images(text, None))
    assert [item.text for item in again.texts] == [item.text for item in document.texts]


def test_pictures_carry_their_part_of_the_page() -> None:
    drawn: list[int] = []

    def draw(number: int) -> Image.Image:
        drawn.append(number)
        page = Image.new("RGB", (1200, 1600), "white")
        page.paste("red", (106, 672, 586, 992))  # 44/500 … 244/500 across, 210/500 … 310/500 down
        return page

    text = PAGE + "<picture><loc_244><loc_210><loc_44><loc_210></picture>"
    document = build_document({1: text}, {1: SIZE}, "page", picture_of=draw)
    crop = document.pictures[0].image.pil_image
    assert abs(crop.width - 480) <= 1 and abs(crop.height - 320) <= 1
    assert crop.getpixel((10, 10)) == (255, 0, 0) == crop.getpixel((470, 310))
    box = document.pictures[1].prov[0].bbox
    assert box.l < box.r and box.t < box.b, "boxes inside out or without an area become some"
    assert drawn == [1], "a page is drawn once for all its pictures"
    assert "data:image/png;base64," in export({1: text}, document, "html")
    assert "data:image/png;base64," in export({1: text}, document, "md")
    assert build_document({1: PAGE}, {1: SIZE}, "page").pictures[0].image is None


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("<doctag><text><loc_1><loc_2><loc_3><loc_4>The budget ends in the midd", "The budget ends in the midd"),
        ("<unordered_list><list_item><loc_1><loc_2><loc_3><loc_4>one</list_item><list_item>tw", "- one\n- tw"),
        ("<list_item>alone</list_item><list_item>too</list_item>", "- alone\n- too"),
        ("<ordered_list>\nbare\n<list_item>framed</list_item></ordered_list>", "1. bare\n2. framed"),
        ("<otsl><ched>A<ched>B<nl><fcel>1<fcel>", "|   1 |     |"),
        ("<otsl><fcel>A<fcel>B<nl><fcel><fcel>2<nl></otsl>", "|     |   2 |"),
        ("<otsl><fcel>A<lcel><fcel>C<nl><ucel><fcel>5<nl></otsl>", "C"),
        ("<otsl><caption>Two\nlines</caption><fcel>1<nl></otsl>", "Two lines"),
        ("Before <text>inside</text> after", "Before\n\ninside\n\nafter"),
        ("No markup at all, 1 < 2", "No markup at all, 1 &lt; 2"),
        ("<paragraph>Old tag</paragraph>", "Old tag"),
        ("<text>Unclosed<section_header_level_2>Then a title</section_header_level_2>", "Unclosed\n\n### Then a title"),
        ("<text>stray</caption></otsl></text>", "stray"),
        ("<code><_C++_>std::vector<int> v;\nif (a<b && c>d) {}</code>", "std::vector<int> v;\nif (a<b && c>d) {}"),
        ("<code><_HTML_><p>Hi</p><b>x</b></code>", "<p>Hi</p><b>x</b>"),
        ("<text>Values a<b and c>d stay</text>", "a&lt;b and c&gt;d stay"),
        ("<unordered_list><list_item>a<unordered_list><list_item>b</list_item></unordered_list></list_item>"
         "<list_item>c</list_item></unordered_list>", "- a\n\n- b\n\n- c"),
        ("<picture><loc_1><loc_2><loc_9><loc_9><pie_chart><otsl><fcel>x<fcel>1<nl></otsl></picture>", "| x   | 1"),
    ],
)  # fmt: skip
def test_nothing_that_was_read_is_lost(written: str, kept: str) -> None:
    assert kept in re.sub(r"\n<!-- .* -->\n", "", markdown(written))


def test_tidying_leaves_a_good_page_alone() -> None:
    body = PAGE.removeprefix("<doctag>").removesuffix("</doctag>")
    assert tidy(PAGE) == body
    assert tidy(tidy(PAGE)) == tidy(PAGE)
    assert is_markup(PAGE) and not is_markup("A photo of 3 < 4 cats")


def text_of(document: Any) -> str:
    """Every text that the document holds, page headers and table cells among it."""
    cells = [cell.text for table in document.tables for cell in table.data.table_cells]
    charts = [
        cell.text
        for picture in document.pictures
        if picture.meta and picture.meta.tabular_chart
        for cell in picture.meta.tabular_chart.chart_data.table_cells
    ]
    return " ".join([*(item.text for item in document.texts), *cells, *charts])


PARTS = [
    "<text>", "</text>", "<unordered_list>", "</unordered_list>", "<ordered_list>", "<list_item>", "</list_item>",
    "<otsl>", "</otsl>", "<fcel>", "<ecel>", "<lcel>", "<ucel>", "<xcel>", "<ched>", "<nl>", "<caption>", "</caption>",
    "<picture>", "</picture>", "<code>", "</code>", "<formula>", "</formula>", "<section_header_level_1>",
    "</section_header_level_1>", "<loc_10><loc_20><loc_30><loc_40>", "<loc_400>", "<page_header>", "</doctag>", "<",
    "\n", "<_Python_>", "<title>", "<inline>", "</inline>", "<document_index>", "<chart>", "<key_value_region>",
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(PARTS), st.integers(0, 9).map(lambda n: f"word{n} ")), max_size=25))
def test_whatever_a_model_writes_becomes_a_document(parts: list[str]) -> None:
    written = "".join(parts)
    document = build_document({1: written, 2: PAGE}, {1: SIZE, 2: SIZE}, "page")
    whole = export({}, document, "md")
    assert "Revenue grew" in whole
    export({}, document, "html")
    export({}, document, "json")
    for word in set(re.findall(r"word\d", written)):
        assert word in text_of(document), written


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(InputError, match="docx"):
        export({1: PAGE}, build_document({1: PAGE}, {1: SIZE}, "page"), "docx")
