"""Pruned activation gradients: the published numbers, right on average, and only where they are wanted."""

from __future__ import annotations

import io
import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from hvd_compress.kernels import random_bits, stream_key
from hvd_compress.kernels.prune import prune_by_bits, prune_dense
from hvd_compress.training import find_places, prune_activation_gradients
from hvd_compress.training.activation_pruning import threshold_of

GRADIENT = [0.01, -0.02, 0.005, 0.03, -0.015, 0.0, 0.08, -0.05, 0.002, -0.12]
UNIFORM = [0.5, 0.9, 0.1, 0.3, 0.2, 0.4, 0.6, 0.8, 0.05, 0.7]
MEAN_MAGNITUDE = 0.0332
LOW, HIGH = 0.028065538307918955, 0.0684424077085021
VECTORS = [
    (0.5, LOW, [0.0, 0.0, LOW, 0.03, -LOW, 0.0, 0.08, -0.05, LOW, -0.12]),
    (0.9, HIGH, [0.0, 0.0, 0.0, HIGH, -HIGH, 0.0, 0.08, 0.0, 0.0, -0.12]),
]


def normal(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


# The kernel


@pytest.mark.parametrize(("rate", "threshold", "expected"), VECTORS)
def test_worked_example(rate, threshold, expected):
    gradient = torch.tensor(GRADIENT)
    bits = (torch.tensor(UNIFORM, dtype=torch.float64) * 2**24).to(torch.int32)
    pruned, below = prune_by_bits(gradient, threshold_of(MEAN_MAGNITUDE, rate), bits)
    assert torch.equal(pruned, torch.tensor(expected))
    assert below == sum(abs(g) < threshold for g in GRADIENT)


@pytest.mark.parametrize(("rate", "threshold", "_"), VECTORS)
def test_thresholds_of_the_worked_example(rate, threshold, _):
    assert threshold_of(MEAN_MAGNITUDE, rate) == pytest.approx(threshold, rel=1e-14)


def test_kernel_follows_its_formula_element_by_element():
    gradient, threshold, key = normal(1000), 0.7, stream_key(3, 1, 4)
    pruned, total, below = prune_dense(gradient.view(10, 100), threshold, key)
    assert pruned.shape == (10, 100)
    expected, _ = prune_by_bits(gradient, threshold, random_bits(1000, key))
    assert torch.equal(pruned.view(-1), expected)
    assert total == pytest.approx(math.fsum(gradient.abs().tolist()), rel=1e-13)
    assert below == int((gradient.abs() < torch.tensor(threshold)).sum())
    assert set(pruned[pruned.abs() < threshold].tolist()) <= {0.0, -0.0}


def test_layout_does_not_change_the_result():
    gradient = normal(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    straight = prune_dense(gradient, 1.0, 7)
    turned = prune_dense(gradient.contiguous(memory_format=torch.channels_last), 1.0, 7)
    assert torch.equal(straight[0], turned[0])
    assert straight[2] == turned[2]


def test_input_stays_and_the_key_decides():
    gradient = normal(10_000)
    before = gradient.clone()
    first, again, other = (prune_dense(gradient, 1.0, key)[0] for key in (1, 1, 2))
    assert torch.equal(gradient, before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_unbiased_within_five_standard_errors(dtype):
    gradient = normal(200).to(dtype)
    threshold, passes = threshold_of(float(gradient.abs().double().mean()), 0.9), 20_000
    # One call prunes all passes, each element of which has bits of its own.
    repeated = gradient.repeat(passes, 1)
    pruned, _, below = prune_dense(repeated, threshold, key=stream_key(5))
    survivor = float(torch.tensor(threshold, dtype=torch.float32).to(dtype))  # what the type can hold
    magnitude = gradient.abs().double()
    variance = torch.where(magnitude < survivor, magnitude * (survivor - magnitude), 0.0)
    error = (pruned.double().mean(0) - gradient.double()).abs()
    assert (error <= 5 * (variance / passes).sqrt() + 1e-12).all()
    spread = pruned.double().var(0, unbiased=False)
    assert torch.allclose(spread.mean(), variance.mean(), rtol=0.02)
    assert below == passes * int((magnitude < survivor).sum())
    assert pruned.dtype == dtype


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.9, 0.95])
def test_fractions_of_normal_data(rate):
    gradient = 3e-4 * normal(200_000)
    threshold = threshold_of(float(gradient.abs().mean()), rate)
    pruned, _, below = prune_dense(gradient, threshold, 11)
    assert below / gradient.numel() == pytest.approx(rate, abs=0.01)
    z = NormalDist().inv_cdf((1 + rate) / 2)
    zero = rate - math.sqrt(2 / math.pi) * (1 - math.exp(-z * z / 2)) / z
    assert float((pruned == 0).double().mean()) == pytest.approx(zero, abs=0.01)


def test_non_finite_values_stay_and_finite_ones_are_still_pruned():
    gradient = torch.tensor([math.nan, math.inf, -math.inf, 0.001, -5.0])
    pruned, total, below = prune_dense(gradient, 1.0, 0)
    assert torch.isnan(pruned[0])
    assert pruned[1:3].tolist() == [math.inf, -math.inf]
    assert abs(pruned[3]) in (0.0, 1.0)
    assert pruned[4] == -5.0
    assert math.isnan(total)
    assert below == 1


@pytest.mark.parametrize("gradient", [torch.zeros(5), torch.empty(0), torch.tensor(-2.0), normal(7)])
def test_threshold_zero_changes_nothing(gradient):
    pruned, total, below = prune_dense(gradient, 0.0, 1)
    assert torch.equal(pruned, gradient)
    assert total == pytest.approx(float(gradient.double().abs().sum()))
    assert below == 0


def test_zeros_and_the_threshold_itself_stay():
    pruned, _, below = prune_dense(torch.tensor([0.0, 0.5, -0.5]), 0.5, 1)
    assert pruned.tolist() == [0.0, 0.5, -0.5]
    assert below == 1


def test_a_threshold_beyond_the_type_is_its_largest_value():
    pruned, _, below = prune_dense(torch.full((100,), 6e4, dtype=torch.float16), 1e5, 1)
    assert set(pruned.tolist()) == {0.0, 65504.0}
    assert below == 100


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        prune_dense(torch.ones(3), threshold, 1)


# Where


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)],
        *[nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 4)],
    )


def test_places_are_those_of_the_paper():
    assert find_places(plain()) == {"0": "input", "2": "input"}
    assert find_places(normalised()) == {"0": "output", "3": "output"}
    nested = nn.ModuleDict({"body": normalised(), "head": nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())})
    assert find_places(nested) == {"body.0": "output", "body.3": "output"}


def backward(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    inputs = normal(32 * 64, seed).view(32, 1, 8, 8)
    model.zero_grad()
    model(inputs).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_only_what_comes_before_a_place_changes():
    reference = backward(plain(), 9)
    model = plain()
    with prune_activation_gradients(model, 0.9, modules={"2": "input"}, history=1):
        backward(model, 8)
        pruned = backward(model, 9)
    changed = {name for name in pruned if not torch.equal(pruned[name], reference[name])}
    assert changed == {"0.weight", "0.bias"}
    model = plain()
    with prune_activation_gradients(model, 0.9, modules={"2": "output"}, history=1):
        backward(model, 8)
        pruned = backward(model, 9)
    changed = {name for name in pruned if not torch.equal(pruned[name], reference[name])}
    assert changed == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_second_path_from_the_same_tensor_is_not_pruned():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(x)

    model = Residual()
    nn.init.constant_(model.conv.weight, 1.0)
    x = torch.zeros(1, 1, 500, requires_grad=True)
    weights = normal(500).view(1, 1, 500)
    with prune_activation_gradients(model, 0.9, modules={"conv": "input"}, history=1):
        for _ in range(2):
            x.grad = None
            (model(x) * weights).sum().backward()
    assert x.grad is not None
    through_the_convolution = x.grad - weights
    threshold = threshold_of(float(weights.abs().double().mean()), 0.9)
    assert float((through_the_convolution.abs() < 1e-6).double().mean()) > 0.4
    survivors = through_the_convolution[through_the_convolution.abs() > 1e-6].abs()
    assert survivors.min() == pytest.approx(threshold, rel=1e-5)


@pytest.mark.parametrize("make", [plain, normalised])
def test_parameter_gradients_are_right_on_average(make):
    model = make()
    exact = backward(model, 3)["0.weight"]
    draws = []
    with prune_activation_gradients(model, 0.9, history=1):
        backward(model, 3)
        for _ in range(400):
            draws.append(backward(model, 3)["0.weight"])
    stacked = torch.stack(draws).double()
    standard_error = stacked.std(0) / math.sqrt(len(draws))
    assert (standard_error > 0).all()
    assert ((stacked.mean(0) - exact).abs() <= 5 * standard_error).all()


# The threshold's history, and what was realised


class Leak(nn.Module):
    """Hands the gradient that a test chooses to its convolution, whose output it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 1)

    def feed(self, gradient: torch.Tensor) -> None:
        self.conv(torch.zeros(1, 1, gradient.numel())).backward(gradient.view(1, 1, -1))


def test_threshold_is_the_mean_of_the_last_few():
    model = Leak()
    with prune_activation_gradients(model, 0.9, modules={"conv": "output"}, history=3) as pruning:
        own = []
        for step, scale in enumerate([1.0, 2.0, 4.0, 8.0, 16.0]):
            gradient = scale * normal(1000, step)
            assert pruning.thresholds() == {"conv": None if step < 3 else pytest.approx(sum(own[-3:]) / 3)}
            assert (pruning.realised() == {}) == (step <= 3)
            model.feed(gradient)
            own.append(threshold_of(float(gradient.abs().double().mean()), 0.9))
        assert pruning.realised()["conv"].elements == 2000


def test_nothing_is_pruned_until_the_history_is_full():
    reference = backward(plain(), 0)
    model = plain()
    with prune_activation_gradients(model, 0.9, history=2):
        assert all(torch.equal(reference[name], gradient) for name, gradient in backward(model, 0).items())
        assert all(torch.equal(reference[name], gradient) for name, gradient in backward(model, 0).items())
        assert any(not torch.equal(reference[name], gradient) for name, gradient in backward(model, 0).items())


def test_realised_fractions_of_a_steady_normal_gradient():
    model = Leak()
    with prune_activation_gradients(model, 0.9, modules={"conv": "output"}, count_zeros=True) as pruning:
        for step in range(25):
            model.feed(1e-3 * normal(20_000, step))
        realised = pruning.realised()["conv"]
    assert realised.elements == 20 * 20_000
    assert realised.below == pytest.approx(0.90, abs=0.01)
    assert realised.zero == pytest.approx(0.54, abs=0.01)


def test_an_overflow_does_not_poison_the_history():
    model = Leak()
    with prune_activation_gradients(model, 0.9, modules={"conv": "output"}, history=1) as pruning:
        model.feed(normal(100))
        threshold = pruning.thresholds()
        model.feed(torch.full((100,), math.inf))
        assert model.conv.bias is not None
        assert not torch.isfinite(model.conv.bias.grad).all()  # a GradScaler sees it
        assert pruning.thresholds() == threshold
        model.feed(torch.zeros(100))
        assert pruning.thresholds() == {"conv": 0.0}
        model.feed(normal(100))
        assert pruning.realised()["conv"].below < 1


def test_seeds_and_modules_and_steps_draw_their_own_bits():
    def run(seed: int) -> list[torch.Tensor]:
        model = plain()
        with prune_activation_gradients(model, 0.9, history=1, seed=seed):
            backward(model, 0)
            return [backward(model, 0)["0.weight"] for _ in range(2)]

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_states_resume_to_the_same_bits():
    model = plain()
    with prune_activation_gradients(model, 0.9, history=2, count_zeros=True) as pruning:
        for seed in range(4):
            backward(model, seed)
        file = io.BytesIO()
        torch.save(pruning.state_dict(), file)
        expected = [backward(model, seed) for seed in (4, 5)]
        realised = pruning.realised()
    file.seek(0)
    with prune_activation_gradients(model, 0.9, history=2, count_zeros=True) as resumed:
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for seed, gradients in zip((4, 5), expected):
            mine = backward(model, seed)
            assert all(torch.equal(mine[name], gradients[name]) for name in mine)
        assert resumed.realised() == realised
        with pytest.raises(ValueError, match="modules"):
            resumed.load_state_dict({})


def test_removing_restores_exact_gradients():
    reference = backward(plain(), 1)
    model = plain()
    pruning = prune_activation_gradients(model, 0.9, history=1)
    backward(model, 0)
    pruning.remove()
    assert all(torch.equal(reference[name], gradient) for name, gradient in backward(model, 1).items())


def test_inference_is_left_alone():
    model = plain()
    inputs = normal(64).view(1, 1, 8, 8)
    expected = model(inputs)
    with prune_activation_gradients(model, 0.9), torch.no_grad():
        assert torch.equal(model(inputs), expected)


def test_second_derivatives_are_refused():
    model = plain()
    with prune_activation_gradients(model, 0.9):
        loss = model(normal(64).view(1, 1, 8, 8)).square().sum()
        with pytest.raises(RuntimeError, match="create_graph"):
            torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate"),
        ({"rate": 1.0}, "rate"),
        ({"history": 0}, "history"),
        ({"modules": {"9": "input"}}, "must give 'input' or 'output'"),
        ({"modules": {"2": "inside"}}, "must give 'input' or 'output'"),
        ({"modules": {}}, "name the places"),
    ],
)
def test_bad_options_are_refused(options, message):
    model = plain()
    with pytest.raises(ValueError, match=message):
        prune_activation_gradients(model, **options)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_convolutions_must_name_its_places():
    with pytest.raises(ValueError, match="name the places"):
        prune_activation_gradients(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
