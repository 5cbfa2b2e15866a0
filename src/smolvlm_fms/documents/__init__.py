"""Documents through the Docling checkpoints: pages in, DocTags out, and from them Markdown, HTML or JSON.

    file ─▶ pages.open_document ─▶ pictures ─▶ engine ─▶ DocTags a page ─▶ doctags.build_document ─▶ Markdown, HTML …
             (PDF, TIFF, picture)              (convert.convert_pages,
                                                resumes from a sidecar)

``pypdfium2`` draws PDF pages and ``docling-core`` knows DocTags; both come with the extra ``docling`` and are imported
where they are needed.
"""

from __future__ import annotations
