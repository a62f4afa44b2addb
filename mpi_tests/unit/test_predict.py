"""hvd-compress predict, as a user calls it, and what bench refuses."""

import json
from pathlib import Path

import pytest

from hvd_compress.commands import main
from hvd_compress.log import log

CHEAP = ["--ranks", "2", "--link", "100mbit", "--methods", "topk:density=0.05,qsgd"]
MODEL = """
import torch
from shapes import WIDTH

def plain():
    return torch.nn.Linear(WIDTH, WIDTH)

def pair():
    return plain(), lambda model: model(torch.randn(8, WIDTH)).square().mean()

def nothing():
    return 1

def broken():
    raise RuntimeError("no data")
"""


@pytest.fixture(autouse=True)
def level():
    before = log.level
    yield
    log.setLevel(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "shapes.py").write_text("WIDTH = 200")
    path = tmp_path / "train.py"
    path.write_text(MODEL)
    return path


def predict(*arguments: str) -> int:
    return main(["predict", *CHEAP, *arguments])


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        predict(*arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_table_ends_with_a_recommendation_and_has_no_control_codes(capsys):
    assert predict("--parameters", "250K", "--backward", "20ms") == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "topk:density=0.05" in shown
    assert "recommended: " in shown.splitlines()[-1]
    assert "250,000 parameters in 1 tensors" in " ".join(shown.split())
    assert "94 Mbit/s of payload" in shown


def test_as_json_it_has_all_numbers(capsys):
    assert predict("--parameters", "2.5M", "--backward", "20ms", "--other", "5ms", "--cycle", "0s", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {row["method"]: row for row in found["rows"]}
    assert by_name["none"]["received_bytes"] == pytest.approx(4 * 2.5e6, rel=1e-3)
    assert found["compute"] == {"backward_seconds": 0.02, "other_seconds": 0.005}
    assert found["cluster"]["cycle_seconds"] == 0
    assert all(row["step_seconds"] >= 0.025 for row in found["rows"])
    assert found["recommended"].startswith(("qsgd", "topk"))


def test_a_model_that_computes_a_loss_is_timed(capsys, model):
    assert predict("--model", f"{model}:pair", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["compute"]["backward_seconds"] > 0
    assert found["compute"]["other_seconds"] > 0


def test_a_plot_is_written(capsys, model, tmp_path):
    picture = tmp_path / "step.png"
    assert predict("--model", f"{model}:plain", "--backward", "1ms", "--plot", str(picture)) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1] == f"plot: {picture}"


def told_by_doctor(path: Path, hosts: str, *links: tuple[int, int, float]) -> Path:
    """Ranks by the letters of their hosts; links in Gbit/s."""
    found = {
        "ranks": [{"host": host} for host in hosts],
        "links": [
            {"ranks": [a, b], "latency_seconds": 1e-4 * b, "bits_per_second": 1e9 * rate} for a, b, rate in links
        ],
        "sums_bits_per_second": 4e8,
    }
    path.write_text(json.dumps(found))
    return path


def test_the_network_is_what_doctor_found_unless_it_is_told(capsys, tmp_path):
    path = told_by_doctor(tmp_path / "doctor.json", "aabb", (0, 1, 0.1), (0, 2, 2.0), (1, 2, 0.8))
    command = ["predict", "--methods", "qsgd", "--parameters", "250K", "--backward", "9ms", "--json"]
    assert main([*command, "--doctor", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)["cluster"]
    measured = {"ranks": 4, "ranks_per_node": 2, "bandwidth": 1e8, "latency_seconds": 2e-4, "sum_bandwidth": 5e7}
    assert found == measured | {"cycle_seconds": 1e-3}
    assert main([*command, "--doctor", str(path), "--ranks", "16", "--latency", "1ms"]) == 0
    assert json.loads(capsys.readouterr().out)["cluster"] == found | {"ranks": 16, "latency_seconds": 1e-3}
    assert main([*command, "--doctor", str(path), "--link", "100mbit"]) == 0
    named = json.loads(capsys.readouterr().out)["cluster"]
    assert named == found | {"bandwidth": pytest.approx(0.94 * 12.5e6), "sum_bandwidth": None}


@pytest.mark.parametrize(
    ("hosts", "links", "told"),
    [
        ("aa", [(0, 1, 1.0)], "no link between two nodes"),
        ("aab", [(1, 2, 1.0)], "unlike numbers of ranks on its nodes, [1, 2]: give --per-node"),
        ("a", [(0, 1, 1.0)], "is not what hvd-compress doctor --json prints"),
    ],
)
def test_what_doctor_found_must_be_of_a_network(capsys, tmp_path, hosts, links, told):
    path = told_by_doctor(tmp_path / "doctor.json", hosts, *links)
    command = ["predict", "--parameters", "1M", "--backward", "1ms", "--doctor", str(path)]
    with pytest.raises(SystemExit):
        main(command)
    assert told in capsys.readouterr().err


def test_without_a_network_it_asks_for_one(capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--parameters", "1M", "--backward", "1ms"])
    assert "give --link and --ranks, or --doctor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--parameters", "many", "--backward", "1ms"], "'many' is no number: such as 25M"),
        (["--parameters", "1M", "--backward", "85"], "'85' is no time: such as 85ms, in s, ms, us"),
        (["--parameters", "1M"], "give --backward"),
        (["--parameters", "0", "--backward", "1ms"], "--parameters must be at least 1"),
        (["--parameters", "1M", "--backward", "1ms", "--link", "1gigabyte"], "is no rate: such as 1gbit"),
        (["--parameters", "1M", "--backward", "1ms", "--ranks", "4", "--per-node", "4"], "at least two nodes"),
        (["--parameters", "1M", "--backward", "1ms", "--methods", "topkk"], "no such method: topkk"),
        (["--parameters", "1M", "--backward", "1ms", "--methods", "topk:density"], "no OPTION=VALUE"),
        (["--parameters", "1M", "--backward", "1ms", "--methods", "topk:density=3"], "density must be in"),
        (["--parameters", "1M", "--backward", "1ms", "--methods", "topk:rate=3"], "unexpected keyword argument 'rate'"),
        (["--parameters", "1M", "--backward", "1ms", "--plot", "step.doc"], "a picture's name ends in"),
        (["--parameters", "1M", "--backward", "1ms", "--plot", "nowhere/step.png"], "no such folder"),
        (["--model", "train.py"], "is no FILE:FUNCTION"),
        (["--model", "nowhere.py:f"], "there is no file nowhere.py"),
    ],
)
def test_what_cannot_be_is_told_with_what_can(capsys, arguments, told):
    assert told in refused(capsys, *arguments)


@pytest.mark.parametrize(("variable", "value"), [("HVD_COMPRESS_METHOD", "topk"), ("HVD_COMPRESS_OFF", "1")])
def test_methods_that_the_environment_changes_are_not_compared(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    assert f"{variable} is set" in refused(capsys, "--parameters", "1M", "--backward", "1ms")


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("plain", "give --backward"),
        ("nothing", "must return a torch.nn.Module"),
        ("broken", "RuntimeError: no data"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_of_a_model_that_cannot_be_had_the_reason_is_told(capsys, model, function, told):
    assert told in refused(capsys, "--model", f"{model}:{function}")


@pytest.mark.parametrize(
    ("function", "told"), [("plain", "must return a pair"), ("pair", "start it by a launcher"), ("broken", "no data")]
)
def test_bench_asks_for_a_loss_and_a_launcher_before_it_waits_for_anybody(capsys, model, function, told):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--model", f"{model}:{function}"])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
