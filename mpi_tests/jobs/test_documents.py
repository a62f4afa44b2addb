"""The examples run, and so do the commands and imports that the documents show."""

import ast
import json
import re
import shlex
import sys

import pytest

from hvd_compress.commands.methods import NAMES

from .launch import ROOT, no_control_codes, run_program, start

EXAMPLES = [
    ("horovod-mpi", 2, "horovod_digits.py", "none,terngrad,adacomp,topk"),
    ("horovod-gloo", 2, "horovod_char_lm.py", "topk"),
    ("mpi4py", 2, "mpi_digits.py", "none,topk"),
    ("mpirun", 1, "mpi_digits.py", "adacomp"),
    ("torchrun", 2, "ddp_transformer.py", "topk"),
]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS += sorted((ROOT / "examples").glob("*.md"))


def fenced(*languages):
    """The blocks in these languages, of all documents."""
    for document in DOCUMENTS:
        for language, block in re.findall(r"^```(\w+)\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
            if language in languages:
                yield pytest.param(block, id=f"{document.relative_to(ROOT)}: {block.strip().splitlines()[0]}")


@pytest.mark.parametrize(("launcher", "ranks", "example", "methods"), EXAMPLES)
def test_example_runs_and_compares_its_methods(launcher, ranks, example, methods, tmp_path):
    table = tmp_path / "table.json"
    options = ["--methods", methods, "--epochs", "0.2", "--json", str(table)]
    picture = tmp_path / "curves.png" if example == "horovod_digits.py" else None  # by what all of them share
    options += ["--plot", str(picture)] if picture else []
    ended = run_program(launcher, ranks, ROOT / "examples" / example, *options, timeout_seconds=90)
    assert ended.code == 0, str(ended)
    assert ended.left_behind == []
    assert no_control_codes(ended.output)
    assert not picture or picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(table.read_text())
    assert [row["method"] for row in rows] == methods.split(",")
    for row in rows:
        assert row["ranks"] == ranks
        assert row["value"] > 0
        assert re.search(rf"{row['method']}\b.* {row['value']:.2f}\b", ended.of_rank(0)), str(ended)
        if ranks == 1:
            assert row["compressed_ratio"] is None
        elif row["method"] != "none":
            assert row["compressed_ratio"] > 4, row


def test_the_example_of_sparse_training_runs_and_sends_less_in_compressed_phases():
    ended = run_program("mpirun", 2, ROOT / "examples" / "acdc_digits.py", "--epochs", "2", timeout_seconds=90)
    assert ended.code == 0, str(ended)
    assert no_control_codes(ended.output)
    output = ended.of_rank(0)
    found = [re.search(rf"in {phase} phases: ([\d,]+)", output) for phase in ("dense", "compressed")]
    dense, compressed = (int(match[1].replace(",", "")) for match in found)
    assert 0.1 * dense < compressed < 0.11 * dense, output  # biases are not pruned
    for what in ("dense training", "sparse model", "dense twin"):
        assert f"{what}: test accuracy" in output


def test_the_example_of_one_process_runs():
    example = ROOT / "examples" / "activation_pruning.py"
    ended = start([sys.executable, str(example), "--epochs", "1"]).end(90)
    assert ended.code == 0, str(ended)
    assert no_control_codes(ended.output)
    assert "pruned gradients: test accuracy" in str(ended)


@pytest.mark.parametrize("block", list(fenced("bash", "sh", "shell")))
def test_documented_commands_run(block):
    for line in block.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if not command or command[0] in ("git", "cd", "sudo", "apt", "apt-get", "docker"):
            continue  # they prepare a machine
        if command[0] == "make":
            command.insert(1, "-n")  # what it would run is run elsewhere, and takes minutes
        ended = start(command).end(120)
        assert ended.code == 0, str(ended)


def imports_of(block):
    """What a block imports, or names by its full path, of this package."""
    tree = ast.parse(block)
    package = re.compile(r"(from|import) hvd_compress\b")
    statements = [code for node in tree.body if package.match(code := ast.unparse(node))]
    return statements + sorted(set(re.findall(r"^hvd_compress(?:\.\w+)+", block, re.MULTILINE)))


RUN_EACH = """
import sys, traceback
for block in sys.argv[1:]:
    try:
        exec(block, {})
    except Exception:
        traceback.print_exc()
        sys.exit(f"in the block: {block}")
"""


def test_documented_code_parses_and_imports_what_it_uses_of_this_package():
    blocks = ["\n".join(statements) for block in fenced("python") if (statements := imports_of(block.values[0]))]
    assert blocks
    ended = start([sys.executable, "-c", RUN_EACH, *blocks]).end(60)
    assert ended.code == 0, str(ended)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_method_has_a_page_with_what_it_costs_and_when_not_to_use_it():
    pages = {path.stem: path.read_text() for path in (ROOT / "docs" / "methods").glob("*.md")}
    half = {"fp16", "bf16"}
    assert pages.keys() - {"half"} == set(NAMES) - {"none"} - half
    for name, page in pages.items():
        for method in half if name == "half" else {name}:
            assert f"Compression.{method}" in page
        for what in ("on the wire", "a rank of N receives", "memory between steps", "accuracy: ", "## When not"):
            assert what in page, f"{name}: {what}"


def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml"]
    ended = start([*map(str, command), "--site-dir", str(tmp_path)]).end(60)
    assert ended.code == 0, str(ended)
    assert (tmp_path / "index.html").exists()
