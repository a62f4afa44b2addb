"""Grow-and-prune: a worked example, what stays zero, and what travels meanwhile."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hvd_compress import Compression
from hvd_compress.local import LocalRanks
from hvd_compress.training import GaP


def rows(*values):
    model = nn.Sequential(*(nn.Linear(len(row), 1, bias=False) for row in values))
    for layer, row in zip(model, values):
        layer.weight.data = torch.tensor([row])
    return model


def zeros(model):
    return [layer.weight.flatten().eq(0).tolist() for layer in model]


def test_a_worked_example():
    """Two tensors of four weights, of which half are pruned, between two that stay; each grows for two steps, once."""
    model = rows([1.0, 2.0], [4.0, -3.0, 2.0, 1.0], [1.0, 5.0, -6.0, 2.0], [3.0])
    gap = GaP(model, torch.optim.SGD(model.parameters(), lr=1.0), units=2, partitions=2, sparsity=0.5)
    assert gap.partitions == (("1.weight",), ("2.weight",))
    gap.begin(0)
    assert gap.grown == ("1.weight",)
    assert zeros(model) == [[False] * 2, [False] * 4, [True, False, False, True], [False]]
    gap.begin(1)
    model[1].weight.data = torch.tensor([[1.0, 2.0, 3.0, -4.0]])
    gap.begin(2)
    assert gap.grown == ("2.weight",)
    assert model[1].weight.tolist() == [[0.0, 0.0, 3.0, -4.0]]
    assert gap.masks.keys() == {"1.weight"}
    assert model[2].weight.tolist() == [[0.0, 5.0, -6.0, 0.0]]  # what grows comes back from zero
    gap.begin(3)
    model[2].weight.data = torch.tensor([[7.0, 5.0, -6.0, 8.0]])
    gap.begin(4)
    assert gap.grown == ()
    assert model[2].weight.tolist() == [[7.0, 0.0, 0.0, 8.0]]
    assert model[0].weight.tolist() == [[1.0, 2.0]]
    assert gap.realised_sparsity() == 0.5
    version = gap.version
    for unit in range(5, 9):
        gap.begin(unit)
    assert gap.version == version  # it is trained on as it is


def test_partitions_are_consecutive_and_of_about_as_many_weights():
    sizes = [1000, 100, 10, 10, 80, 60, 40, 300, 1]  # of which the first and the last stay dense
    model = nn.Sequential(*(nn.Linear(size, 1, bias=False) for size in sizes))
    gap = GaP(model, torch.optim.SGD(model.parameters(), lr=1.0), units=1, partitions=3)
    found = [[int(name.split(".")[0]) for name in part] for part in gap.partitions]
    assert found == [[1, 2, 3, 4], [5, 6], [7]]
    assert GaP(model, torch.optim.SGD(model.parameters(), lr=1.0), units=1, partitions=7).partitions[3] == ("4.weight",)


def trained(model, optimizer, gap, compressions, units, first=0):
    ranks = LocalRanks(compressions) if compressions else None
    for unit in range(first, first + units):
        gap.begin(unit)
        gradients = []
        for rank in range(2):
            torch.manual_seed(10 * unit + rank)
            model.zero_grad()
            model(torch.randn(8, 30)).square().mean().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        combined = ranks.exchange(gradients)[0] if ranks else gradients[0]
        for name, parameter in model.named_parameters():
            parameter.grad = combined[name]
        optimizer.step()


def make():
    torch.manual_seed(0)
    sizes = [30, 10, 40, 40, 20, 5]
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_pruned_weights_stay_zero_and_only_what_is_kept_travels(scope):
    model, optimizer = make()
    gap = GaP(model, optimizer, units=3, rounds=2, partitions=3, sparsity=0.75, scope=scope)
    named = list(model.named_parameters())
    compressions = [Compression.masked(gap, named, min_numel=1) for _ in range(2)]
    ranks = LocalRanks(compressions)
    weights = {"2.weight": 400, "4.weight": 1600, "6.weight": 800}
    for unit in range(21):
        gap.begin(unit)
        kept = {name: int(gap.masks[name].sum()) if name in gap.masks else numel for name, numel in weights.items()}
        assert kept == {name: n if name in gap.grown else kept[name] for name, n in weights.items()}
        sparse = sum(n for name, n in weights.items() if name not in gap.grown)
        assert sum(kept.values()) == sum(weights.values()) - sparse + sparse // 4
        before = compressions[0].telemetry.total.sent_bytes
        ranks.exchange([{name: torch.randn(p.shape) for name, p in named} for _ in range(2)])
        sent = compressions[0].telemetry.total.sent_bytes - before
        values = 4 * (sum(kept.values()) + 400 + 115)  # with the two ends, and biases
        assert values <= sent < values + 700  # headers and a digest
        optimizer.zero_grad()
        model(torch.randn(8, 30)).square().mean().backward()
        optimizer.step()
        assert all(int(torch.count_nonzero(p)) <= kept[name] for name, p in named if name in kept)
    assert gap.grown == ()
    assert gap.realised_sparsity() == 0.75


def test_it_resumes_anywhere_to_the_same_bits():
    model, optimizer = make()
    gap = GaP(model, optimizer, units=3, partitions=3)
    trained(model, optimizer, gap, None, 5)
    again, other = make()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = GaP(again, other, units=3, partitions=3)
    resumed.load_state_dict(copy.deepcopy(gap.state_dict()))
    trained(model, optimizer, gap, None, 7, first=5)
    trained(again, other, resumed, None, 7, first=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert gap.digest() == resumed.digest()


def test_a_turn_that_is_skipped_is_an_error_that_says_what_to_do():
    model, optimizer = make()
    gap = GaP(model, optimizer, units=3, partitions=3)
    with pytest.raises(ValueError, match=r"call begin\(\) for every epoch"):
        gap.begin(3)
    with pytest.raises(ValueError, match="count from 0"):
        gap.begin(-1)
    gap.begin(0)
    with pytest.raises(ValueError, match=r"call begin\(\) for every epoch"):
        gap.begin(7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"units": 0}, "units and rounds must be at least 1"),
        ({"units": 1, "rounds": 0}, "units and rounds must be at least 1"),
        ({"units": 1, "sparsity": 1.0}, "sparsity must be in"),
        ({"units": 1, "scope": "layer"}, "scope must be"),
        ({"units": 1, "partitions": 4}, "partitions must be from 2 to 3"),
        ({"units": 1, "exclude": ("nothing",)}, "matches no parameter"),
    ],
)
def test_options_that_cannot_work_are_errors(options, says):
    with pytest.raises(ValueError, match=says):
        GaP(*make(), **{"partitions": 3, **options})
