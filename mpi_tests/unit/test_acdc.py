"""AC/DC: its schedules, its masks to the last weight, and what it does to optimizers."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

from hvd_compress.training import ACDC, Masks, Phase, Schedule
from hvd_compress.training.masks import global_masks, kept, uniform_masks

WEIGHTS = torch.tensor([0.5, -0.1, 0.05, 0.9, -0.02, 0.3, -0.7, 0.01, 0.2, -0.04])

IMAGENET = [
    *[("D", 10), ("C", 5), ("D", 5), ("C", 5), ("D", 5), ("C", 5), ("D", 5), ("C", 5), ("D", 5), ("C", 5), ("D", 5)],
    *[("C", 5), ("D", 5), ("C", 5), ("D", 10), ("C", 15)],
]
# Of the authors' configurations: ranges of the epochs at which they prune, and at which pruned weights return.
CIFAR_PRUNES, CIFAR_RETURNS = range(10, 171, 40), range(30, 161, 40)

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.9),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 25), nn.Linear(25, 4))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(16, 20, generator=generator)
    labels = torch.randint(4, (16,), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Schedules


def test_imagenet_schedule_is_the_published_one():
    schedule = Schedule.imagenet()
    assert [("DC"[phase.compressed], phase.end - phase.start) for phase in schedule.phases] == IMAGENET
    assert schedule.total == 100
    assert schedule.compressed_fraction == 0.5


def test_cifar_schedule_is_the_published_one():
    phases = Schedule.cifar().phases
    assert [phase.start for phase in phases if phase.compressed] == list(CIFAR_PRUNES)
    assert [phase.start for phase in phases if not phase.compressed] == [0, *CIFAR_RETURNS]
    assert Schedule.cifar().total == 200
    assert Schedule.cifar().compressed_fraction == 0.55


def test_phases_join_and_every_unit_is_in_its_own():
    schedule = Schedule((2, 3, 1, 4))
    assert schedule.phases == (Phase(0, 2, False), Phase(2, 5, True), Phase(5, 6, False), Phase(6, 10, True))
    assert [schedule.phase_at(unit) for unit in range(13)] == [0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    with pytest.raises(ValueError, match="count from 0"):
        schedule.phase_at(-1)


def test_scaled_schedules_keep_their_total_and_boundaries():
    assert Schedule.imagenet().scaled(0.2).lengths == (2, *(1,) * 12, 1, 2, 3)
    assert Schedule.imagenet().scaled(390).total == 39_000
    rounded = Schedule.imagenet().scaled(0.33)
    assert rounded.total == 33
    assert min(rounded.lengths) >= 1
    with pytest.raises(ValueError, match="count steps"):
        Schedule.imagenet().scaled(0.05)


@pytest.mark.parametrize("lengths", [(), (5,), (5, 5, 5), (5, 0), (5, -1), (2.5, 2)])
def test_impossible_schedules_are_refused(lengths):
    with pytest.raises(ValueError, match="must"):
        Schedule(lengths)


# Masks


def test_published_vector_keeps_exactly_two():
    expected = [3, 6]  # the released code's strict comparison would keep 3 alone
    for masks in (
        uniform_masks({"w": WEIGHTS}, 0.8),
        global_masks({"w": WEIGHTS}, 0.8),
        global_masks({"w": WEIGHTS}, 0.8, min_share=1.0),
    ):
        assert torch.nonzero(masks["w"]).view(-1).tolist() == expected


@pytest.mark.parametrize(
    ("numel", "sparsity", "expected"),
    [(10, 0.8, 2), (10, 0.7, 3), (10, 0.9, 1), (10, 0.99, 1), (11, 0.9, 2), (1_000_000, 0.98, 20_000), (100, 0.29, 71)],
)
def test_counts_are_those_of_the_decimal_fraction(numel, sparsity, expected):
    assert kept(numel, sparsity) == expected


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9, 0.98])
def test_counts_are_exact_in_both_scopes(sparsity):
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) for n, s in {"a": (40, 50), "b": (7, 11, 3), "c": (9, 9)}.items()}
    total = sum(weight.numel() for weight in weights.values())
    for min_share in (0.0, 0.1, 1.0):
        masks = global_masks(weights, sparsity, min_share=min_share)
        assert sum(int(mask.sum()) for mask in masks.values()) == kept(total, sparsity)
    for name, mask in uniform_masks(weights, sparsity).items():
        assert int(mask.sum()) == kept(weights[name].numel(), sparsity)
        assert mask.shape == weights[name].shape


def test_global_masks_keep_the_largest_of_all():
    weights = {
        "large": torch.randn(100, 10).sign() * torch.linspace(1, 2, 1000).view(100, 10),
        "small": torch.ones(9, 9),
    }
    masks = global_masks(weights, 0.9)
    assert int(masks["small"].sum()) == 0
    largest_pruned = weights["large"][~masks["large"]].abs().max()
    assert largest_pruned < weights["large"][masks["large"]].abs().min()


def test_a_floor_keeps_a_tiny_layer_alive():
    weights = {"large": torch.full((100, 100), 5.0), "tiny": torch.linspace(0, 1, 300).view(3, 100)}
    masks = global_masks(weights, 0.9, min_share=0.1)
    assert torch.nonzero(masks["tiny"].view(-1)).view(-1).tolist() == [297, 298, 299]  # a tenth of 30
    assert int(masks["large"].sum()) == kept(10_300, 0.9) - 3
    least = global_masks({"large": weights["large"], "one": torch.zeros(1, 2)}, 0.9, min_share=0.1)
    assert least["one"].tolist() == [[True, False]]


def test_a_floor_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match="too few"):
        global_masks({str(i): torch.ones(2, 2) for i in range(20)}, 0.99, min_share=0.1)


def test_of_equals_the_lower_index_stays():
    equal = {"a": torch.full((5, 2), -3.0), "b": torch.full((10,), 3.0)}
    masks = global_masks(equal, 0.4)  # 12 of 20
    assert masks["a"].all()
    assert masks["b"].tolist() == [True] * 2 + [False] * 8
    assert uniform_masks(equal, 0.8)["a"].view(-1).tolist() == [True] * 2 + [False] * 8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", [uniform_masks, global_masks])
def test_diverged_weights_are_refused_by_name(bad, make):
    with pytest.raises(ValueError, match=r"'b.weight' are not finite"):
        make({"a": torch.ones(3, 3), "b.weight": torch.tensor([[1.0, bad]])}, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_masks_of_other_types_and_layouts(dtype):
    weight = WEIGHTS.to(dtype).view(2, 5)
    turned = weight.t().contiguous().t()  # not contiguous
    assert torch.equal(global_masks({"w": turned}, 0.8)["w"], global_masks({"w": weight}, 0.8)["w"])
    assert torch.nonzero(global_masks({"w": weight}, 0.8)["w"].reshape(-1)).view(-1).tolist() == [3, 6]


def test_masks_of_a_user_count_their_versions():
    masks = Masks({"w": torch.tensor([True, False])})
    assert (masks.version, masks.masks["w"].tolist()) == (0, [True, False])
    first = masks.digest()
    masks.update({"w": torch.tensor([False, True])})
    assert (masks.version, masks.masks["w"].tolist()) == (1, [False, True])
    assert masks.digest() != first
    assert masks.digest() == Masks({"w": torch.tensor([False, True])}).digest()
    assert masks.digest() != Masks({"v": torch.tensor([False, True])}).digest()
    assert masks.digest() != Masks({"w": torch.tensor([[False], [True]])}).digest()
    with pytest.raises(TypeError):
        masks.masks["w"] = torch.tensor([True, True])
    with pytest.raises(ValueError, match="bool"):
        masks.update({"w": torch.tensor([0.0, 1.0])})


# Training


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masks_hold_through_compressed_phases_and_only_there(make):
    model = make_model()
    optimizer = make(model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 2, 1, 1)), sparsity=0.9)
    prunable = 20 * 30 + 30 * 25 + 25 * 4
    versions = []
    for epoch in range(5):
        acdc.begin(epoch)
        versions.append(acdc.version)
        for step in range(3):
            train_step(model, optimizer, 10 * epoch + step)
            if acdc.compressed:
                assert acdc.masks.keys() == {"0.weight", "3.weight", "4.weight"}
                assert sum(int(mask.sum()) for mask in acdc.masks.values()) == kept(prunable, 0.9)
                for name, mask in acdc.masks.items():
                    weight = dict(model.named_parameters())[name]
                    assert not weight[~mask].any()
                    assert weight.grad is not None
                    assert not weight.grad[~mask].any()
                    assert weight[mask].all()
                assert acdc.realised_sparsity() == pytest.approx(1 - kept(prunable, 0.9) / prunable, abs=1e-12)
        assert acdc.compressed == (epoch in (1, 2, 4))
        if not acdc.compressed:
            assert not acdc.masks
            assert acdc.realised_sparsity() < 0.05
    assert versions == [0, 1, 1, 2, 3]


def test_vectors_are_never_pruned_and_exclusion_is_by_pattern():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1)), sparsity=0.9, exclude=("4.*",))
    before = bits(model)
    acdc.begin(0)
    train_step(model, optimizer, 0)
    acdc.begin(1)
    assert acdc.masks.keys() == {"0.weight", "3.weight"}
    assert acdc.layer_sparsity().keys() == acdc.masks.keys()
    assert model[1].weight.all()
    assert model[4].weight.all()
    assert not torch.equal(before["4.weight"], model[4].weight)


def test_uniform_scope_leaves_both_ends_dense():
    model = make_model()
    acdc = ACDC(model, OPTIMIZERS["sgd"](model.parameters()), schedule=Schedule((1, 1)), sparsity=0.7, scope="uniform")
    acdc.begin(1)
    assert {name: int(mask.sum()) for name, mask in acdc.masks.items()} == {"3.weight": kept(750, 0.7)}


def state_of(optimizer: torch.optim.Optimizer, key: str) -> list[torch.Tensor]:
    return [state[key] for state in optimizer.state.values()]


def test_momentum_restarts_when_weights_return():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1, 1, 1)))
    for epoch in range(2):
        acdc.begin(epoch)
        train_step(model, optimizer, epoch)
    assert all(buffer.any() for buffer in state_of(optimizer, "momentum_buffer"))
    acdc.begin(2)
    assert len(state_of(optimizer, "momentum_buffer")) == len(list(model.parameters()))
    assert not any(buffer.any() for buffer in state_of(optimizer, "momentum_buffer"))


@pytest.mark.parametrize("name", ["adam", "adamw", "nadam"])
def test_adam_goes_on_as_a_new_optimizer_would(name):
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1, 1, 1)))
    for epoch in range(2):
        acdc.begin(epoch)
        train_step(model, optimizer, epoch)
    acdc.begin(2)
    other = copy.deepcopy(model)
    new = OPTIMIZERS[name](other.parameters())
    for step in range(3):
        train_step(model, optimizer, step)
        train_step(other, new, step)
    assert_equal(bits(model), bits(other))


def test_second_moments_of_rmsprop_stay():
    model = make_model()
    optimizer = OPTIMIZERS["rmsprop"](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1, 1, 1)))
    for epoch in range(2):
        acdc.begin(epoch)
        train_step(model, optimizer, epoch)
    squares = copy.deepcopy(state_of(optimizer, "square_avg"))
    acdc.begin(2)
    assert not any(buffer.any() for buffer in state_of(optimizer, "momentum_buffer"))
    assert all(torch.equal(a, b) for a, b in zip(squares, state_of(optimizer, "square_avg")))


def test_dense_twin_is_the_model_as_the_last_dense_phase_left_it():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1, 2, 2)))
    with pytest.raises(RuntimeError, match="no dense phase"):
        acdc.dense_state_dict()
    ends = []
    for epoch in range(6):
        acdc.begin(epoch)
        train_step(model, optimizer, epoch)
        ends.append(bits(model))
    assert_equal(acdc.dense_state_dict(), ends[3])
    assert "1.running_mean" in acdc.dense_state_dict()
    twin = make_model()
    twin.load_state_dict(acdc.dense_state_dict())
    assert all(parameter.all() for parameter in twin.parameters() if parameter.dim() > 1)


@pytest.mark.parametrize("stop", range(1, 8))
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_training_resumes_anywhere_to_the_same_bits(name, stop):
    def start():
        model = make_model()
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, ACDC(model, optimizer, schedule=Schedule((2, 2, 1, 3)))

    def train(model, optimizer, acdc, steps):
        for step in steps:
            acdc.begin(step)
            train_step(model, optimizer, step)

    whole = start()
    train(*whole, range(8))
    first = start()
    train(*first, range(stop))
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as those of torch about hooks that it cannot save
        torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = start()
    for part, state in zip(second, torch.load(file, weights_only=True)):
        part.load_state_dict(state)
    train(*second, range(stop, 8))
    assert_equal(bits(whole[0]), bits(second[0]))
    assert_equal(whole[2].dense_state_dict(), second[2].dense_state_dict())
    assert whole[2].version == second[2].version
    assert whole[2].digest() == second[2].digest()
    assert second[2].masks


def test_states_of_other_models_and_schedules_are_refused():
    model = make_model()
    acdc = ACDC(model, OPTIMIZERS["sgd"](model.parameters()), schedule=Schedule((1, 1, 1, 1)))
    acdc.begin(1)
    state = acdc.state_dict()
    with pytest.raises(ValueError, match="phase 9"):
        acdc.load_state_dict({**state, "phase": 9})
    smaller = nn.Sequential(nn.Linear(20, 31), nn.Linear(31, 4))
    other = ACDC(smaller, OPTIMIZERS["sgd"](smaller.parameters()), schedule=Schedule((1, 1)))
    with pytest.raises(ValueError, match="'0.weight'"):
        other.load_state_dict(state)


def like_horovod(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As hvd.DistributedOptimizer wraps: an instance of a new subclass, whose step calls that of the class."""

    def __init__(self, params):
        super(self.__class__, self).__init__(params)

    def step(self, closure=None):
        return super(self.__class__, self).step(closure)

    base = type(optimizer)
    return type(base.__name__, (base,), {"__init__": __init__, "step": step})(optimizer.param_groups)


def like_mpi(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """As hvd_compress.mpi.DistributedOptimizer wraps: a new subclass that takes over what the instance has."""

    class Mixin(torch.optim.Optimizer):
        def step(self, closure=None):
            return super().step(closure)

    cls = type(type(optimizer).__name__, (Mixin, type(optimizer)), {})
    wrapped = cls.__new__(cls)
    wrapped.__dict__.update(vars(optimizer))
    return wrapped


@pytest.mark.parametrize("wrap", [like_horovod, like_mpi])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("first", ["wrapped", "acdc"])
def test_wrapped_and_scheduled_optimizers_are_masked_alike(wrap, name, first):
    results = []
    for wrapper in (wrap, lambda optimizer: optimizer):
        model = make_model()
        inner = OPTIMIZERS[name](model.parameters())
        optimizer = wrapper(inner)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 20, cycle_momentum=False)
        acdc = ACDC(model, optimizer if first == "wrapped" else inner, schedule=Schedule((1, 2, 1, 2)))
        for epoch in range(6):
            acdc.begin(epoch)
            for step in range(3):
                train_step(model, optimizer, 10 * epoch + step)
                schedule.step()
        assert acdc.realised_sparsity() == pytest.approx(0.9, abs=1e-3)
        results.append(bits(model))
    assert_equal(*results)


def test_weights_that_something_else_has_moved_are_noticed():
    model = make_model()
    acdc = ACDC(model, OPTIMIZERS["sgd"](model.parameters()), schedule=Schedule((1, 3)))
    acdc.begin(0)
    acdc.begin(1)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="no optimizer of them made a step: call apply_masks"):
        acdc.begin(2)
    acdc.apply_masks()
    acdc.begin(2)


def test_the_optimizers_of_other_models_are_left_alone_and_nothing_is_kept_alive():
    model, other = make_model(), make_model()
    optimizer, of_other = (OPTIMIZERS["sgd"](m.parameters()) for m in (model, other))
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1, 1, 1)))
    for epoch in range(3):
        acdc.begin(epoch)
        train_step(other, of_other, epoch)
    assert all(state["momentum_buffer"].any() for state in of_other.state.values())
    hooks = len(_global_optimizer_post_hooks)
    gone = weakref.ref(acdc)
    del acdc
    gc.collect()
    assert gone() is None
    assert len(_global_optimizer_post_hooks) == hooks - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_precision_skips_and_resumes(dtype):
    model = make_model().to(dtype)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 3)))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    skipped = []
    for step in range(4):
        acdc.begin(step)
        optimizer.zero_grad()
        inputs = torch.randn(8, 20, dtype=dtype)
        scaler.scale(model(inputs).square().mean()).backward()
        if step == 2:  # an overflow in a pruned place must stay visible
            hidden = acdc.masks["3.weight"].logical_not().nonzero()[0]
            model[3].weight.grad = None
            poison = torch.zeros_like(model[3].weight)
            poison[tuple(hidden)] = float("inf")
            (model[3].weight * poison).sum().backward()
        before = bits(model)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped.append(scaler.get_scale() < scale)
        if skipped[-1]:
            assert_equal(before, bits(model))
        assert acdc.realised_sparsity() == pytest.approx(0.9 if step else 0.0, abs=1e-3)
    assert skipped == [False, False, True, False]


def test_progress_is_told_in_order():
    model = make_model()
    acdc = ACDC(model, OPTIMIZERS["sgd"](model.parameters()), schedule=Schedule((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="load_state_dict"):
        acdc.begin(2)
    acdc.begin(1)
    acdc.begin(1)  # an epoch that starts over
    assert acdc.version == 1
    with pytest.raises(ValueError, match="in order"):
        acdc.begin(0)


def test_removed_acdc_lets_weights_grow_again():
    model = make_model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    acdc = ACDC(model, optimizer, schedule=Schedule((1, 1)))
    acdc.begin(1)
    train_step(model, optimizer, 0)
    assert acdc.realised_sparsity() > 0.89
    acdc.remove()
    for step in range(1, 10):
        train_step(model, optimizer, step)
    assert acdc.realised_sparsity() < 0.5  # the rest feeds units that are dead by now


@pytest.mark.parametrize(
    "wrong",
    [{"sparsity": 0.0}, {"sparsity": 1.0}, {"scope": "layer"}, {"min_share": 1.5}, {"exclude": ("fc.*",)}],
)
def test_bad_options_are_refused(wrong):
    model = make_model()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ACDC(model, OPTIMIZERS["sgd"](model.parameters()), schedule=Schedule.imagenet(), **wrong)


def test_a_model_without_weights_to_prune_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no weights to prune"):
        ACDC(model, OPTIMIZERS["sgd"](model.parameters()), schedule=Schedule.imagenet(), scope="uniform")


def test_equal_weights_give_equal_masks_whatever_the_order_of_training():
    digests = set()
    for order in itertools.permutations(range(3)):
        model = make_model()
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        acdc = ACDC(model, optimizer, schedule=Schedule((1, 1)))
        for step in order:
            train_step(model, optimizer, step)
        model.load_state_dict(make_model().state_dict())  # as a broadcast would
        acdc.begin(1)
        digests.add(acdc.digest())
    assert len(digests) == 1
