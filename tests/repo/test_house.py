"""The house is in order: what a machine can see of the rules in CONTRIBUTING.md."""

import ast
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "paged_mlx"
DOCS = sorted(ROOT.glob("docs/*.md"))


def modules() -> dict[str, Path]:
    """The package's modules by dotted name."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                folder = path.parents[node.level - 1].relative_to(PACKAGE.parent)
                base = ".".join([*folder.parts, *filter(None, [node.module])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found & modules().keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty when there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def tracked(*folders: str) -> list[Path]:
    """Files of the repository in these folders."""
    command = ["git", "ls-files", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a checkout")
    return [path for line in done.stdout.splitlines() if (path := ROOT / line).is_file()]


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_module_imports_itself_by_a_circle():
    graph = {name: imports(path) - {name} for name, path in modules().items()}
    assert circle(graph) == []


def test_the_library_imports_no_test_code():
    users = {
        name
        for name, path in modules().items()
        if any(".testing" in other for other in imports(path)) and ".testing" not in name
    }
    assert users <= {"paged_mlx.machine.doctor", "paged_mlx.machine.doctor_on_gpu"}


def test_no_function_of_others_loses_its_code_and_nobody_reads_stack_frames():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"__code__|_getframe", path.read_text()), path


def test_an_option_of_attention_is_spelled_in_few_files():
    files = [
        path
        for path in tracked("kernels", "csrc", "python")
        if "softcap" in path.read_text().lower()
        and not {"testing", "reference"} & set(path.relative_to(ROOT).parts)
    ]
    assert len(files) <= 10, [str(path.relative_to(ROOT)) for path in files]


def test_the_tests_that_the_invariants_name_exist():
    written = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/invariants.md").read_text()))
    assert named and named <= written, named - written


def test_vocabulary_is_short_and_has_no_word_twice():
    table = (ROOT / "docs/vocabulary.md").read_text()
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")][1:]
    words = [word.strip() for row in rows for word in row.split(",")]
    assert len(rows) <= 45
    assert len(words) == len(set(words)), [word for word in words if words.count(word) > 1]


def test_links_between_docs_lead_somewhere():
    for page in [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_of_the_docs_is_in_the_sites_menu():
    menu = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(menu) == [page.name for page in DOCS]


def test_files_that_docs_name_exist():
    for page in [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(
            r"`((?:python|csrc|kernels|tests|benchmarks|examples|cmake)/[\w/.]*)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_modules_and_names_that_docs_name_exist():
    for page in [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for name in re.findall(r"`(paged_mlx(?:\.[A-Za-z]\w*)+)", page.read_text()):
            assert is_there(name), f"{page.name} names {name}"


def is_there(name: str) -> bool:
    """Whether a dotted name leads somewhere."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_no_file_names_a_path_of_a_machine():
    for path in tracked():
        if path.suffix in {".py", ".md", ".h", ".cpp", ".metal", ".toml", ".yml", ".cmake"}:
            found = re.search(r"(?<![\w.])/(?:home|root|work|Users)/\w", path.read_text())
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"
