"""A hook of MkDocs: links that leave docs/, such as those to tests, are plain text in the site."""

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """A page's text, in which links to files of the repository outside docs/ are plain text.

    Raises:
        FileNotFoundError: such a file does not exist.
    """

    def unlink(match: re.Match[str]) -> str:
        target = Path(config["docs_dir"], page.file.src_uri).parent / match[2]
        if not target.exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links to {match[2]}, which does not exist"
            )
        return match[1]

    return LINK.sub(unlink, markdown)
