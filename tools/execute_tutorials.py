"""Execute the tutorials and write the notebooks beside them.

python tools/execute_tutorials.py [NAME ...]
"""

import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent / "tutorials"


def execute(source: Path) -> None:
    notebook = jupytext.read(source)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    for number, cell in enumerate(notebook.cells):  # stable bytes: no random ids, no times
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    jupytext.write(notebook, source.with_suffix(".ipynb"))
    print(source.with_suffix(".ipynb"))


if __name__ == "__main__":
    chosen = sys.argv[1:]
    for path in sorted(ROOT.glob("[0-9]_*.py")):
        if not chosen or path.stem in chosen:
            execute(path)
