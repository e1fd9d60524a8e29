"""Collect documentation of installed packages as further texts for training exit heads.

    python examples/documentation_texts.py texts.jsonl --count 620
    sedac fit BASE -o my-sedac --train-data texts.jsonl

Heads gain from any text that the base can read. Nothing is chosen or certified on these texts.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SHORTEST, LONGEST = 300, 1500  # characters


def paragraphs(text: str) -> Iterator[str]:
    """Neighbouring paragraphs of a description, joined to a useful length."""
    text = re.sub(r"<[^>]+>|\[!\[.*", "", text)
    joined = ""
    for paragraph in text.split("\n\n"):
        joined += paragraph + "\n\n"
        if len(joined) > 900:
            yield joined[:LONGEST]
            joined = ""
    yield joined[:LONGEST]


def documented_code(path: Path) -> Iterator[str]:
    """Functions and classes with a docstring, and the docstring of the module itself."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return
    lines = source.splitlines(keepends=True)
    yield (ast.get_docstring(tree) or "")[:LONGEST]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            code = "".join(lines[node.lineno - 1 : node.end_lineno])
            if len(code) <= LONGEST:
                yield code


def collect() -> list[str]:
    """Descriptions of installed packages and documented code of the standard library."""
    packages = Path(sysconfig.get_path("purelib"))
    library = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for metadata in sorted(packages.glob("*.dist-info/METADATA")):
        text = metadata.read_text(encoding="utf-8", errors="ignore")
        found += paragraphs(text.partition("\n\n")[2])
    for pattern in ("*.py", "*/*.py"):
        for path in sorted(library.glob(pattern)):
            if not {"test", "tests", "site-packages", "idlelib", "encodings"} & set(path.parts):
                found += documented_code(path)
    unique = {text.strip()[:80]: text.strip() for text in found if len(text.strip()) >= SHORTEST}
    return list(unique.values())


def main() -> None:
    """Write the texts as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--count", type=int, default=620)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    texts = collect()
    random.Random(arguments.seed).shuffle(texts)
    texts = texts[: arguments.count]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    arguments.output.write_text(lines, encoding="utf-8")
    print(f"{len(texts)} texts, {sum(map(len, texts)):,} characters: {arguments.output}")


if __name__ == "__main__":
    main()
