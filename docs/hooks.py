"""Pages that are files of the repository: their links are those of the repository, not of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the file in place of the page; a link out of the docs becomes the name of the file."""
    name = FILES.get(page.file.src_uri)
    if name is None:
        return markdown
    text = re.sub(r"\]\(docs/", "](", (ROOT / name).read_text(encoding="utf-8"))
    return re.sub(r"\[([^\]]+)\]\((?!\w+://)(?!(?:design/|api/)?\w+\.md)[^)]*\)", r"`\1`", text)
