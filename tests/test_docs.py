import importlib.util
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_the_tree_in_the_architecture_page_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tools" / "tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.PAGE.read_text(encoding="utf-8")
    assert page == module.page_with_tree(page), "run python docs/tools/tree.py"
