"""The tree of the package in docs/architecture.md, one line a file: `python docs/tools/tree.py` writes it anew.

A line is the first sentence of the module's docstring, so that code and page say the same; a test compares them.
"""

import ast
from pathlib import Path


ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree: docs/tools/tree.py -->\n```text\n", "```\n<!-- end of tree -->"
# What is in the folders that hold no Python, or more than Python.
FOLDERS = {
    "src/hf_e5/filters/resources": "meta talk of models",
    "src/hf_e5/report/assets": "style, script and template of the page",
    "src/hf_e5/synthesis/prompts": "one template a task type",
    "src/hf_e5/synthesis/resources": "task types, domains, prices",
    "src/hf_e5/recipes": "the repository's recipes/, as package data",
}


def lines(folder: Path, depth: int = 0) -> list[str]:
    """The lines of a folder: its files, then its folders."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        name = path.relative_to(ROOT).as_posix()
        if path.is_dir() and (name in FOLDERS or (path / "__init__.py").is_file()):
            said = FOLDERS.get(name) or first_sentence(path / "__init__.py")
            found.append(line(path.name + "/", said, depth))
            found += [] if name in FOLDERS else lines(path, depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            found.append(line(path.name, first_sentence(path), depth))
    return found


def line(name: str, said: str, depth: int) -> str:
    start = f"{'  ' * depth}{name:<{28 - 2 * depth}} "
    return (start + said).rstrip()


def first_sentence(module: Path) -> str:
    text = " ".join((ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "").split("\n\n")[0].split())
    sentence = text.partition(". ")[0].removesuffix(".").replace("`", "")
    return sentence if len(sentence) < 110 else sentence[:106].rpartition(" ")[0] + " ..."


def tree() -> str:
    return "\n".join(["src/hf_e5/", *lines(ROOT / "src" / "hf_e5", 1)]) + "\n"


def page_with_tree(page: str) -> str:
    """The text of the page with today's tree between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + tree() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page_with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
