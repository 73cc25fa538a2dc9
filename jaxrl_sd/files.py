"""Files of which nobody reads half: each is written under another name, then renamed."""

from collections.abc import Callable
from pathlib import Path


def replace(file: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file. A kill leaves the old file or the new one."""
    write(unfinished(file))
    publish(file)


def replace_text(file: Path, text: str) -> None:
    """Writes a text, as `replace` does."""
    replace(file, lambda path: path.write_text(text, encoding="utf-8"))


def unfinished(file: Path) -> Path:
    """The name of a file while it is written."""
    return file.with_name(f"{file.name}.tmp")


def publish(file: Path) -> None:
    """Gives what is in `unfinished(file)` its name."""
    unfinished(file).replace(file)
