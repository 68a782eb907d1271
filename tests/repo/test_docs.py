"""The pages: links lead somewhere, examples are true, the generated page is fresh, fragments have a known kind."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "newsfragments").glob("README.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.M)


def code_blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def anchors(page):
    """Return the anchors that a page's headings make, as forges make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in HEADING.findall(text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in LINK.findall(text):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name} links to {target}, which is not there"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name} links to {target}; headings there: {sorted(anchors(found))}"


def test_readme_examples_compile_and_use_names_that_exist():
    blocks = code_blocks(ROOT / "README.md", "python")
    assert blocks
    import tenure

    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tenure":
                assert callable(getattr(tenure, node.attr)), f"README uses tenure.{node.attr}"


def test_readme_commands_exist():
    from tenure.cli.commands import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.typer_instance.info.name for group in app.registered_groups}
    used = set(
        re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?tenure ([a-z]+)", "\n".join(code_blocks(ROOT / "README.md", "sh")), re.M)
    )
    assert used
    assert used <= verbs


def test_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        used = set(re.findall(r"^make ([a-z]+)", "\n".join(code_blocks(page, "sh")), re.M))
        assert used <= targets, f"{page.name} names {sorted(used - targets)}"


def test_the_command_line_page_is_what_the_commands_say():
    done = subprocess.run(
        [sys.executable, "tools/cli_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_job_files_in_the_pages_and_examples_parse():
    from tenure.jobfile import parse_job_file

    texts = {f"{page.name}[{n}]": t for page in PAGES for n, t in enumerate(code_blocks(page, "toml"))}
    texts |= {path.name: path.read_text() for path in (ROOT / "examples").glob("*.toml")}
    assert "digits.toml" in texts
    for source, text in texts.items():
        assert parse_job_file(text, source=source).stages


def test_the_job_file_page_names_every_key():
    from tenure import jobfile

    page = (ROOT / "docs" / "job-file.md").read_text()
    keys = {key for kind in jobfile._KEYS.values() for key in kind}
    nouns = (jobfile.Envelope, jobfile.Retry, jobfile.Probe, jobfile.TrainGoal, jobfile.ServeGoal, jobfile.ServerOptions)
    keys |= {jobfile._key(field.name) for noun in nouns for field in jobfile.fields(noun)}
    assert not {key for key in keys if f"`{key}`" not in page}


def test_every_end_reason_and_exit_code_is_explained():
    from tenure.leases import EndReason

    page = (ROOT / "docs" / "faults.md").read_text()
    assert not [reason for reason in EndReason if f"`{reason}`" not in page]


def test_news_fragments_have_a_known_kind():
    for path in (ROOT / "newsfragments").iterdir():
        assert path.name == "README.md" or re.fullmatch(r"\+[\w-]+\.(feature|bugfix|removal)\.md", path.name), path.name
