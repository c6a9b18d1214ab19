"""English documentation that lies on any machine with Python: enough text to try things offline."""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from minilm_jax.data.documents import Document

# Test data, other people's packages and code without prose.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "idlelib", "lib2to3", "lib-dynload", "pydoc_data"}
    | {"site-packages", "test", "tests", "turtledemo"}
)
_SHORTEST_DOCUMENT = 80


def machine_documents() -> Iterator[Document]:
    """Yields CPython's language reference topics, then the docstrings of its standard library.

    One document a topic, one a class with its methods, one a module with its functions. The
    order and the text depend on the Python version alone. Nothing is imported but the topics:
    the sources are parsed.
    """
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(topics[name].strip(), language="en", origin=f"python-topic:{name}")
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _source_files(library):
        name = path.relative_to(library).with_suffix("").as_posix().replace("/", ".")
        yield from _docstring_documents(path, name.removesuffix(".__init__"))


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS and not path.name.startswith("config-"):
                yield from _source_files(path)
        elif path.suffix == ".py":
            yield path


def _docstring_documents(path: Path, module: str) -> Iterator[Document]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        tree = ast.parse(path.read_bytes(), filename=str(path))
    outside_classes = [tree, *_functions(tree)]
    texts = {module: _docstrings(outside_classes)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            texts.setdefault(f"{module}.{node.name}", _docstrings([node, *_functions(node)]))
    for name, text in texts.items():
        if len(text) >= _SHORTEST_DOCUMENT:
            yield Document(text, language="en", origin=f"python-docstring:{name}")


def _functions(
    node: ast.Module | ast.ClassDef,
) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [x for x in node.body if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)]


def _docstrings(nodes: list) -> str:
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text.strip() for text in found if text and text.strip())
