"""The files of an open project: they are read by what they are written for, and agree with the package."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import draftune

ROOT = Path(__file__).parent.parent
FORM = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PRE_COMMIT = ROOT / ".pre-commit-config.yaml"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def project(key: str) -> Any:
    """Return a value of pyproject.toml that Python reads as TOML does. Python 3.10 has no tomllib."""
    return ast.literal_eval(re.findall(rf"^{key} = (.+)$", PYPROJECT, re.MULTILINE)[0])


def test_the_citation_is_of_this_version() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["version"] == draftune.__version__
    assert citation["license"] == project("license")
    assert {"authors", "message", "title"} <= citation.keys()
    for reference in citation["references"]:
        assert {"authors", "title", "type"} <= reference.keys()
    assert "arXiv:2309.17400" in [entry["value"] for entry in citation["references"][0]["identifiers"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_can_be_read(path: Path) -> None:
    workflow = read(path)
    assert workflow[True]  # YAML 1.1 reads the key "on" as a truth value; GitHub does not
    makefile = (ROOT / "Makefile").read_text()
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        for step in job["steps"]:
            if step.get("run", "").startswith("make "):
                assert re.search(rf"^{step['run'].split()[1]}:", makefile, re.MULTILINE)


def test_a_workflow_runs_the_tests_on_each_python() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "tests.yml")
    versions = workflow["jobs"]["cpu"]["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 as a number is 3.1
    assert f">={versions[0]}" == project("requires-python")
    assert set(versions) == set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT))
    targets = {name: [step.get("run") for step in job["steps"]] for name, job in workflow["jobs"].items()}
    assert "make test-all" in targets["cpu"]
    assert "make test-oldest" in targets["oldest"]


def bounds() -> dict[str, str]:
    """Return the lower bound of each package in pyproject.toml; that of the core for one that an extra raises."""
    return dict(reversed(re.findall(r'"([\w-]+)>=([\d.]+)"', PYPROJECT.partition("\ndependencies")[2])))


def core() -> set[str]:
    """Return the names of the dependencies that are always installed."""
    return set(re.findall(r'"([\w-]+)', PYPROJECT.partition("\ndependencies")[2].partition("]")[0]))


def test_the_extras_that_files_name_are_there() -> None:
    extras = set(re.findall(r"^(\w+) = \[", PYPROJECT.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "Dockerfile", ROOT / "Makefile"])
    named = re.findall(r"""(?:draftune|['"]\.+)\[([a-z\d,]+)\]""", text)
    assert {"tensorboard", "quant", "data"} <= extras
    assert {name for names in named for name in names.split(",")} <= extras
    assert set(re.findall(r"""require\([^\n]*, "(\w+)"\)""", text)) <= extras


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    text = (ROOT / "constraints-oldest.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))
    del pinned["torchvision"]  # the SmolVLM of transformers 4 needs it
    assert core() <= pinned.keys()
    for name, version in pinned.items():
        assert re.fullmatch(rf"{re.escape(bounds()[name])}(\.0)*", version), name


def test_what_the_package_imports_is_declared_and_the_reverse() -> None:
    imports = re.compile(r"^ *(?:import|from) (\w+)(?:[\w.]* import.*|[\w.]*)$", re.MULTILINE)
    used = {name for path in (ROOT / "src").rglob("*.py") for name in imports.findall(path.read_text(encoding="utf-8"))}
    used -= {*sys.stdlib_module_names, "draftune"}
    modules = {"pillow": "PIL", "pyyaml": "yaml"}
    assert {modules.get(name, name) for name in core()} <= used
    assert used <= {modules.get(name, name) for name in bounds()} | {"pyarrow"}  # of datasets


def test_the_commands_that_run_the_tests_are_targets_that_the_readme_names() -> None:
    makefile, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "README.md"))
    for target in ("test", "test-all"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert f"`make {target}`" in readme
    assert re.match(r"make test(-all)?\b", (ROOT / ".ci" / "run").read_text().splitlines()[-1])


def test_there_is_a_workflow() -> None:
    assert WORKFLOWS


def test_the_issue_form_asks_for_the_environment() -> None:
    form = read(FORM)
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"] if field["type"] != "markdown"}
    assert len(fields) == len(form["body"])
    assert all(field["attributes"]["label"] for field in fields.values())
    assert "`draftune env`" in fields["environment"]["attributes"]["label"]
    assert fields["environment"]["validations"]["required"] is True


def test_pre_commit_runs_the_linter_that_make_runs() -> None:
    local = {
        hook["id"]: hook for repo in read(PRE_COMMIT)["repos"] if repo["repo"] == "local" for hook in repo["hooks"]
    }
    makefile = (ROOT / "Makefile").read_text()
    for name, command in (("ruff-check", "ruff check"), ("ruff-format", "ruff format")):
        assert local[name]["entry"].startswith(f".venv/bin/{command}")
        assert f"$(BIN)/{command}" in makefile
    assert re.search(r"^ruff==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_the_notice_names_files_that_are_there_and_all_weights() -> None:
    named = re.findall(r"\b(?:src|docs|recipes)/[\w./-]*\w", (ROOT / "NOTICE").read_text(encoding="utf-8"))
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []
    assets = ROOT / "src" / "draftune" / "assets"
    folders = {path.relative_to(assets).parts[0] for path in assets.rglob("*.safetensors")}
    assert {f"src/draftune/assets/{folder}" for folder in folders} <= set(named)


def test_distributions_hold_license_and_notice() -> None:
    files = project("license-files")
    assert {"LICENSE", "NOTICE"} <= set(files)
    assert all((ROOT / name).is_file() for name in files)


def test_the_changelog_has_this_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert draftune.__version__ in headings
