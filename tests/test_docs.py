"""README.md and docs/*.md: links, anchors, files, flags and metrics exist in the code."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "common").glob("*.py")]
OTHERS_FLAGS = {  # of deepspeed, torchrun, srun, hf, pip, transformers
    "hostfile",
    "include",
    "local-dir",
    "master_addr",
    "nnodes",
    "nproc_per_node",
    "ntasks-per-node",
    "num_gpus",
    "port",
    "rdzv_backend",
    "rdzv_endpoint",
    "repo-type",
}


def anchors(page):
    """Anchors that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file), target


def test_metrics_are_explained():
    glossary = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    name = r'"((?:reward|consensus|loss|rollout|time|train|data)/[a-z_]*[a-z])"'
    for source in SOURCES:
        for metric in re.findall(name, source.read_text(encoding="utf-8")):
            assert f"`{metric}`" in glossary, metric


def test_readme_names_every_file():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for source in SOURCES:
        assert f"{source.name}`" in readme or source.name == "__init__.py", source.name


def test_pictures_are_used():
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.name in pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    text = page.read_text(encoding="utf-8")
    # A page may add flags of its own, as docs/hacking.md does.
    code = text + "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)):
        known = re.search(rf'^ +{flag}: |"--{flag}"|^ +"{flag}": ', code, re.MULTILINE)
        assert known or flag in OTHERS_FLAGS, flag
