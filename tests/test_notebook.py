"""The notebook of examples/ runs from first cell to last, and its search finds what the trained model finds."""

import json

import nbformat
import pytest
from nbclient import NotebookClient

from support import ROOT


NOTEBOOK = ROOT / "examples" / "from_records_to_search.ipynb"

# Run after the last cell: what the notebook made, and the similarities of the model before the export.
LOOK = """
instruction = "Given a web search query, retrieve relevant passages that answer the query"
trained = model.encode(queries, instruction=instruction) @ model.encode(documents).T
print(json.dumps({
    "rows": sum(len(part) for part in dataset.values()), "steps": trainer.state.global_step,
    "queries": queries, "documents": documents, "similarities": trained.tolist(),
}))
"""


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell: nbformat.NotebookNode) -> list[str]:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout").splitlines()


def test_the_notebook_is_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


def test_the_notebook_searches_with_the_model_that_it_trained(notebook, tiny_checkpoint):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    code[0].source = f"BASE = {str(tiny_checkpoint)!r}\nNUM_RECORDS = 300\nNUM_STEPS = 3"
    notebook.cells.append(nbformat.v4.new_code_cell(LOOK))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()

    made = json.loads(printed(notebook.cells[-1])[-1])
    assert (made["rows"], made["steps"]) == (300, 3)
    results = printed(code[-1])
    assert results[::2] == made["queries"]
    for line, similarities in zip(results[1::2], made["similarities"], strict=True):
        similarity, document = line.strip().split("  ")
        assert document == made["documents"][similarities.index(max(similarities))]
        assert float(similarity) == pytest.approx(max(similarities), abs=0.005 + 1e-5)  # two decimals, fp32
