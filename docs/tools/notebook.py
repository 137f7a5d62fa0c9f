"""A mkdocs hook: the notebook of `examples/` as a page, so that it is written once."""

import json
from pathlib import Path

from mkdocs.structure.files import File


NOTEBOOK = "examples/from_records_to_search.ipynb"


def on_files(files, config):
    cells = json.loads((Path(config.config_file_path).parent / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    parts.append(f"This page is `{NOTEBOOK}`, which a test runs.")
    files.append(File.generated(config, "notebook.md", content="\n\n".join(parts)))
    return files
