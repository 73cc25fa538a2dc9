"""The notebooks run from top to bottom, and as committed they show what they gave."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = ["credit_by_hand", "tiny_run", "your_method", "tpu_run"]
SECONDS = 600  # for one cell; a whole notebook takes a tenth
LARGEST = 400_000  # bytes, so that sites that host code show it
OF_A_MACHINE = ("/home/", "/root/", "/tmp/", "/var/", "/Users/", "site-packages")
every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def expect_outputs(notebook: nbformat.NotebookNode) -> None:
    """Every cell has run, in order, and shows something, if only that it was skipped."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = {output.output_type for output in cell.outputs}
        assert kinds and "error" not in kinds, cell.source


def test_all_notebooks_are_tested():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(NAMES)


@every_notebook
def test_runs_from_top_to_bottom(name, tmp_path):
    notebook = read(name)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    expect_outputs(notebook)


@every_notebook
def test_can_be_read_as_committed(name):
    notebook = read(name)
    expect_outputs(notebook)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    for cell in code_cells(notebook):
        text = json.dumps(cell.outputs)
        assert not [place for place in OF_A_MACHINE if place in text], cell.source
        assert "warning" not in text.lower(), cell.source
