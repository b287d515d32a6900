"""Make a Markdown file's relative links absolute: ``absolute_links.py FILE REPOSITORY TAG``.

A package index shows the README away from its repository. Run on a release's copy, never committed.
"""

import re
import sys
from pathlib import Path


def absolute(text: str, repository: str, tag: str) -> str:
    """Pictures point at the file itself, other links at the page that shows it."""

    def link(found: re.Match[str]) -> str:
        bang, title, target = found.groups()
        return f"{bang}[{title}]({repository}/{'raw' if bang else 'blob'}/{tag}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)", link, text)


if __name__ == "__main__":
    path, repository, tag = sys.argv[1:]
    Path(path).write_text(absolute(Path(path).read_text(), repository, tag))
