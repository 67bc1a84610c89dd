"""The pages of the documentation, and the code in them."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}


class Block(NamedTuple):
    """A block of code, and the block that comes right before it, with nothing in between."""

    language: str
    code: str
    before: str | None

    @property
    def file(self) -> str | None:
        """The name in its first line, where the block is a file that the reader is to write: ``# train.py``."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.code)
        return found[1] if found else None


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page in a language, or all of them."""
    found, end, last = [], -1, None
    text = PAGES[page].read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        touching = not text[end : match.start()].strip() if end >= 0 else False
        found.append(Block(match[1], match[2], last if touching else None))
        end, last = match.end(), match[1]
    return [block for block in found if language in (None, block.language)]


def commands(page: str) -> list[str]:
    """The commands of a page, one by one."""
    lines = "\n".join(block.code for block in blocks(page, "bash"))
    return [command.strip() for command in re.split(r"&&|\n", lines) if command.strip()]
