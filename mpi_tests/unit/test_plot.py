"""hvd-compress plot, as a user calls it."""

import json
import re

import pytest
import torch

from hvd_compress import Compression
from hvd_compress.commands import main
from hvd_compress.local import LocalRanks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two layers and a vector, by rates that L-GreCo chooses."""
    named = [("<first>", torch.zeros(50, 60)), ("second", torch.zeros(40, 40)), ("bias", torch.zeros(40))]
    compressions = [Compression.lgreco(Compression.topk(named), interval=2, window=2) for _ in range(2)]
    ranks = LocalRanks(compressions)
    compressions[0].telemetry.watch(records=1000, errors=True)
    for _ in range(7):
        ranks.exchange([{name: torch.randn(tensor.shape) for name, tensor in named} for _ in range(2)])
    compressions[0].settle()
    path = tmp_path_factory.mktemp("run") / "run.jsonl"
    compressions[0].telemetry.to_jsonl(path)
    return path


def test_a_picture_goes_beside_the_run_and_numbers_are_printed(run, capsys):
    assert main(["plot", str(run)]) == 0
    assert run.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "steps: 7, 0 to 6" in shown
    assert re.search(r"sent: \S+ MB a step, \S+ times less", shown)
    assert shown.splitlines()[-1] == f"plot: {run.with_suffix('.png')}"


def test_a_page_needs_nothing_else_and_shows_names_as_they_are(run, tmp_path):
    page = tmp_path / "run.html"
    assert main(["plot", str(run), "--out", str(page)]) == 0
    text = page.read_text()
    assert "&lt;first&gt;" in text
    assert "<first>" not in text
    assert "<svg" in text
    assert not re.search(r"(src|href)=.http", text.replace('xlink:href="#', ""))
    assert "@import" not in text


def test_of_many_steps_a_line_has_their_means(tmp_path):
    run = tmp_path / "long.jsonl"
    records = [
        {"step": s, "parameter": f"layer{n}", "raw_bytes": 400, "sent_bytes": 40, "rate": 0.1, "error": None}
        for s in range(2000)
        for n in range(12)
    ]
    run.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["plot", str(run), "--out", str(tmp_path / "long.svg")]) == 0
    assert (tmp_path / "long.svg").stat().st_size < 500_000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no record of a parameter"),
        ("{}\n", "line 1, is no record of telemetry"),
        ("step 1\n", "line 1, is no record of telemetry"),
        (None, "No such file"),
    ],
)
def test_what_is_no_run_is_told(capsys, tmp_path, text, told):
    run = tmp_path / "run.jsonl"
    if text is not None:
        run.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["plot", str(run)])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not run.with_suffix(".png").exists()
