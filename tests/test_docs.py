"""The documents say what the code does: settings and their defaults, presets, the tree, the example."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import results, run_arguments

from fedgen_app.cli import presets, reproduce
from fedgen_app.federation.method import Method, load_method
from fedgen_app.settings import KEYS, defaults
from fedgen_app.sweeps import plan, spec

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def tree() -> list[str]:
    """Paths in README's tree; a folder ends in a slash."""
    block = README.split("## The tree\n\n```\n", 1)[1].split("\n```", 1)[0]
    parents: list[str] = []
    paths = []
    for line in block.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        assert indent % 2 == 0 and indent // 2 <= len(parents), f"wrong indentation: {line}"
        parents = parents[: indent // 2]
        paths.append("".join(parents) + name)
        if name.endswith("/"):
            parents.append(name)
    return paths


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)


def test_every_setting_stands_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z0-9.-]+)` \| `(.*?)` \| (.+?) \| (.+?) \|$", SETTINGS, re.M)
    assert sorted(key for key, *_ in rows) == sorted(KEYS)
    documented = {key: tomllib.loads(f"value = {default}")["value"] for key, default, *_ in rows}
    actual = defaults(ROOT)
    assert documented == actual
    assert {key: type(value) for key, value in documented.items()} == {key: type(v) for key, v in actual.items()}


def test_every_preset_is_named() -> None:
    written = "\n".join(file.read_text(encoding="utf-8") for file in DOCUMENTS)
    assert [name for name in presets.names() if f"`{name}`" not in written] == []


def test_sweeps_are_described() -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert [key for key in spec.SweepFile.model_fields if key != "about" and f"| `{key}` |" not in text] == []
    assert [name for name in reproduce.names() if f"`{name}`" not in text] == []
    blocks = re.findall(r"^```toml\n(.*?)^```$", text, re.M | re.S)
    runs = []
    for block in blocks:
        tree = {"clients": 2} | tomllib.loads(block)
        found = plan.expand(
            spec.parse(tree, "sweeps.md"),
            source=ROOT / "sweep.toml",
            output=Path("/out"),
            defaults=defaults(ROOT),
            load_preset=presets.load,
        )
        runs.append(len(found.runs))
    assert runs == [9, 2, 2]


def test_all_in_the_tree_exists() -> None:
    paths = tree()
    assert len(paths) > 40
    assert len(paths) == len(set(paths))
    missing = [p for p in paths if not ((ROOT / p).is_dir() if p.endswith("/") else (ROOT / p).is_file())]
    assert missing == []


def test_every_module_stands_in_the_tree() -> None:
    package = ROOT / "fedgen_app"
    files = [f for f in sorted(package.rglob("*")) if f.suffix in (".py", ".toml") and f.name != "__init__.py"]
    folders = {f.parent for f in files}
    files += [f for folder in ("benchmarks", "scripts") for f in sorted((ROOT / folder).glob("*.py"))]
    there = {f"{f.relative_to(ROOT)}" for f in files} | {f"{f.relative_to(ROOT)}/" for f in folders}
    assert sorted(there - set(tree())) == []


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_results_have_one_place() -> None:
    lines = README.splitlines()
    assert lines.count("<!-- results -->") == lines.count("<!-- /results -->") == 1
    assert lines.index("<!-- results -->") < lines.index("<!-- /results -->")


@pytest.fixture
def median(monkeypatch: pytest.MonkeyPatch) -> Iterator[Method]:
    """The example of a method, as if its file lay where the document says."""
    name = "fedgen_app.methods.median"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(python_blocks(CONTRIBUTING)[0], "median.py", "exec"), module.__dict__)
    yield load_method("median")


def test_the_example_method_runs(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(ROOT / "fedgen_app", app / "fedgen_app", ignore=shutil.ignore_patterns("__pycache__"))
    (app / "fedgen_assets").symlink_to(ROOT / "fedgen_assets")
    for name in ("server_app.py", "client_app.py", "pyproject.toml"):
        shutil.copy(ROOT / name, app)
    (app / "fedgen_app" / "methods" / "median.py").write_text(python_blocks(CONTRIBUTING)[0], encoding="utf-8")
    asked = run_arguments(tmp_path / "run", num_server_rounds=1, samples__count=0)
    asked[asked.index(str(ROOT))] = str(app)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from fedgen_app.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-P", "-c", code, app, *asked, "--set=method=median"],
        cwd=app,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert results(tmp_path / "run")["method"] == "median"


def test_the_example_method_passes_its_own_tests(median: Method) -> None:
    names: dict[str, object] = {}
    exec(compile(python_blocks(CONTRIBUTING)[1], "test_median.py", "exec"), names)
    tests = {name: value for name, value in names.items() if name.startswith("test_") and callable(value)}
    assert sorted(tests) == ["test_an_outlier_does_not_move_the_median", "test_of_two_it_is_the_mean"]
    for test in tests.values():
        test()
    assert names["METHOD"] is median
