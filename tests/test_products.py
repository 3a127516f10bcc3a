"""Curvature products against dense matrices, and what they must leave alone."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.func import hessian as dense_hessian
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from adaqn_cuda.products import gauss_newton, hessian

RULES = [gauss_newton, hessian]


class Recurrent(nn.Module):
    """A recurrent layer and a readout; returns the state too, as recurrent models do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer(3, 2)
        self.readout = nn.Linear(2, 2)

    def forward(self, x):
        features, state = self.layer(x)
        return self.readout(features), state


class Tied(nn.Module):
    """One weight in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 6)

    def forward(self, x):
        q, k, v = self.project(x)[:, None].chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


MODELS = {
    "mlp": mlp,
    "tied": Tied,
    "attention": Attention,
    "checkpoint": Checkpointed,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
}


def cross_entropy(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def squares(outputs, targets):
    return (outputs - targets).square().mean()


def problem(name, seed=0):
    """A float64 model and a batch of two sequences of three steps."""
    torch.manual_seed(seed)
    model = MODELS[name]().double()
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    return model, (x, torch.randint(0, 2, (3, 2)))


def random_s(model, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        for p in model.parameters()
    }


def flat(values):
    return torch.cat([v.reshape(-1) for v in values.values()])


def matrix(product, params):
    """The matrix of ``product`` over ``params``, column by column."""
    columns = []
    for p in params:
        for index in range(p.numel()):
            s = {q: torch.zeros_like(q, requires_grad=False) for q in params}
            s[p].view(-1)[index] = 1.0
            columns.append(flat(product(s)))
    return torch.stack(columns, dim=1)


def dense(rule, model, loss, batch):
    """The matrix that ``rule`` multiplies by, from its definition."""
    inputs, targets = batch
    model = copy.deepcopy(model)
    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    sizes = [p.numel() for p in model.parameters()]

    def outputs(w):
        pieces = zip(model.named_parameters(), w.split(sizes), strict=True)
        named = {name: piece.view(p.shape) for (name, p), piece in pieces}
        with sdpa_kernel(SDPBackend.MATH):
            result = functional_call(model, named, (inputs,))
        return result[0] if isinstance(result, tuple) else result

    if rule is hessian:
        return dense_hessian(lambda w: loss(outputs(w), targets))(w)
    at = outputs(w)
    j = jacrev(outputs)(w).reshape(at.numel(), -1)
    h = dense_hessian(lambda o: loss(o.view(at.shape), targets))(at.reshape(-1))
    return j.T @ h @ j


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("name", [name for name in MODELS if name != "checkpoint"])
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_dense_matrix(rule, name):
    model, batch = problem(name)
    b = matrix(rule(model, cross_entropy, batch), list(model.parameters()))
    torch.testing.assert_close(b, dense(rule, model, cross_entropy, batch), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b, b.T, rtol=1e-9, atol=1e-12)
    least = torch.linalg.eigvalsh(b)[0]
    assert least > -1e-12 if rule is gauss_newton else least < -1e-3


@pytest.mark.parametrize("rule", RULES)
def test_activation_checkpointing(rule):
    model, batch = problem("checkpoint")
    s = random_s(model)
    y = flat(rule(model, cross_entropy, batch)(s))
    torch.testing.assert_close(y, dense(rule, model.inner, cross_entropy, batch) @ flat(s))


def test_linear_model_has_one_curvature():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    batch = (torch.randn(5, 2, 3, dtype=torch.float64), torch.randint(0, 2, (5, 2)))
    s = random_s(model)
    y_gn, y_h = (flat(rule(model, cross_entropy, batch)(s)) for rule in RULES)
    assert y_gn.norm() > 0.01
    torch.testing.assert_close(y_gn, y_h)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "mlp", "attention"])
def test_lower_precision(name, dtype, rule):
    model, (x, targets) = problem(name)
    model.to(dtype).double()  # values that both precisions hold
    x = x.to(dtype)
    expected = flat(rule(model, cross_entropy, (x.double(), targets))(random_s(model)))
    model.to(dtype)
    result = rule(model, cross_entropy, (x, targets))(random_s(model, torch.float32))
    assert all(y.dtype == torch.float32 and y.shape == p.shape for p, y in result.items())
    error = (flat(result).double() - expected).norm() / expected.norm()
    assert error < 30 * torch.finfo(dtype).eps


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn", "attention"])
def test_cuda_kernels(name, rule):
    model, (x, targets) = problem(name)
    expected = flat(rule(model, cross_entropy, (x, targets))(random_s(model)))
    s = [v.float().cuda() for v in random_s(model).values()]
    model = model.float().cuda()
    addresses = [p.data_ptr() for p in model.parameters()]
    batch = (x.float().cuda(), targets.cuda())
    result = rule(model, cross_entropy, batch)(dict(zip(model.parameters(), s, strict=True)))
    torch.testing.assert_close(flat(result).double().cpu(), expected, rtol=1e-3, atol=1e-5)
    cross_entropy(model(batch[0])[0] if name != "attention" else model(batch[0]), batch[1])
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("rule", RULES)
def test_follows_the_parameters(rule):
    model, batch = problem("mlp")
    product, s = rule(model, cross_entropy, batch), random_s(model)
    before = flat(product(s))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    after = flat(product(s))
    assert (after - before).norm() > 0.1 * before.norm()
    torch.testing.assert_close(after, dense(rule, model, cross_entropy, batch) @ flat(s))


@pytest.mark.parametrize("rule", RULES)
def test_batch_from_a_callable(rule):
    model, first = problem("mlp")
    _, second = problem("mlp", seed=5)
    batches = iter([first, list(second)])
    product, s = rule(model, cross_entropy, lambda: next(batches)), random_s(model)
    for batch in (first, second):
        expected = rule(model, cross_entropy, batch)(s)
        assert torch.equal(flat(product(s)), flat(expected))
    assert next(batches, None) is None


@pytest.mark.parametrize("rule", RULES)
def test_compiled_model(rule):
    model, batch = problem("mlp")
    s = random_s(model)
    compiled = torch.compile(model, backend="aot_eager")
    y = rule(compiled, cross_entropy, batch)(s)
    assert torch.equal(flat(y), flat(rule(model, cross_entropy, batch)(s)))


@pytest.mark.parametrize("rule", RULES)
def test_data_parallel_wrapper(rule):
    model, batch = problem("mlp")
    s = random_s(model)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        y = rule(wrapped, cross_entropy, batch)(s)
        for _ in range(2):
            cross_entropy(wrapped(batch[0]), batch[1]).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(flat(y), flat(rule(model, cross_entropy, batch)(s)))


# --------------------------------------------------------------------------- which parameters


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("frozen", [False, True])
def test_constant_parameters(rule, frozen):
    """A parameter that is frozen, or that the optimizer lacks, is a constant of the model."""
    model, batch = problem("lstm")
    s, whole = random_s(model), dense(rule, model, cross_entropy, batch)
    constant = model.layer.weight_hh_l0
    moving = torch.cat([torch.full((p.numel(),), p is not constant) for p in model.parameters()])
    expected = whole[moving][:, moving] @ flat(s)[moving]
    if frozen:
        constant.requires_grad_(False)
    else:
        del s[constant]
    y = rule(model, cross_entropy, batch)(s)
    assert y.keys() == {p for p in model.parameters() if p is not constant}
    torch.testing.assert_close(flat(y), expected)


@pytest.mark.parametrize("rule", RULES)
def test_all_frozen_or_none(rule):
    model, batch = problem("mlp")
    product = rule(model, cross_entropy, batch)
    assert product({}) == {}
    assert product(random_s(model.requires_grad_(False))) == {}


@pytest.mark.parametrize("rule", RULES)
def test_foreign_parameters(rule):
    model, batch = problem("mlp")
    foreign, product = nn.Parameter(torch.ones(2)), rule(model, cross_entropy, batch)
    s = random_s(model)
    y = product({foreign: torch.ones(2), **s})
    assert foreign not in y and torch.equal(flat(y), flat(product(s)))
    with pytest.raises(ValueError, match="model: none of the optimizer's parameters"):
        rule(copy.deepcopy(model), cross_entropy, batch)(s)


@pytest.mark.parametrize("rule", RULES)
def test_without_curvature(rule):
    """Zeros where the loss is linear in the outputs, or a parameter plays no part."""
    model, (x, targets) = problem("mlp")
    model.idle = nn.Parameter(torch.ones(2))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    s = random_s(model)
    y = rule(model, cross_entropy, (x, targets))(s)
    assert torch.equal(y[model.idle], torch.zeros(2)) and y[model[0].weight].norm() > 0
    linear = nn.Linear(3, 2).double()
    y = rule(linear, lambda o, t: o.sum(), (x, targets))(random_s(linear))
    assert y.keys() == set(linear.parameters()) and not flat(y).any()
    y = rule(linear, lambda o, t: torch.ones(()), (x, targets))(random_s(linear))
    assert not flat(y).any()


# --------------------------------------------------------------------------- what stays as it was


class Counting(nn.Module):
    """Writes a buffer and replaces another in every call, in any mode."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = x.mean()
        return self.inner(x) * (1 + self.calls)


@pytest.mark.parametrize("rule", RULES)
def test_buffers(rule):
    model = Counting().double()
    _, batch = problem("mlp")
    product, s = rule(model, cross_entropy, batch), random_s(model)
    calls, last = model.calls, model.last
    first = flat(product(s))
    assert torch.equal(flat(product(s)), first)
    assert model.calls is calls and model.last is last and calls == 0 and last == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_modes_come_back(rule, fails):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.LSTM(2, 2)
    ).double()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    assert len(set(modes)) == 2
    state, seen = copy.deepcopy(model.state_dict()), []

    def loss(outputs, targets):
        seen.append((any(m.training for m in model.modules()), torch.backends.cudnn.enabled))
        if fails:
            raise RuntimeError("no loss")
        return squares(outputs, targets)

    batch = (torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, 2, dtype=torch.float64))
    product, s = rule(model, loss, batch), random_s(model)
    if fails:
        with pytest.raises(RuntimeError, match="no loss"):
            product(s)
    else:
        torch.manual_seed(1)
        first = flat(product(s))
        assert torch.equal(flat(product(s)), first)
    assert set(seen) == {(False, False)}
    assert [m.training for m in model.modules()] == modes
    assert torch.backends.cudnn.enabled
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_gradients_and_s_stay(rule, name):
    model, batch = problem(name)
    params = list(model.parameters())
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    s = random_s(model)
    kept = copy.copy(s), {p: v.clone() for p, v in s.items()}
    w = [p.detach().clone() for p in params]
    expected = rule(model, cross_entropy, batch)(s)
    with torch.no_grad():
        y = rule(model, cross_entropy, batch)(s)
        assert not torch.is_grad_enabled()
    assert params[0].grad is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params[1:])
    assert all(s[p] is kept[0][p] and torch.equal(s[p], kept[1][p]) for p in params)
    assert all(torch.equal(p, value) for p, value in zip(params, w, strict=True))
    assert not any(v.requires_grad for v in y.values())
    assert list(y) == params and flat(y).any() and torch.equal(flat(y), flat(expected))
    if name == "lstm":  # the layer still reads its own parameters
        before = model(batch[0])[0]
        with torch.no_grad():
            model.layer.weight_ih_l0.add_(1)
        assert not torch.allclose(model(batch[0])[0], before)


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(model=lambda x: x), TypeError, "model: expected an nn.Module, got function"),
        (dict(loss=1.0), TypeError, "loss: expected a callable .* got float"),
        (dict(batch=torch.ones(2)), TypeError, "batch: expected a pair .* got Tensor"),
        (dict(batch=(1, 2, 3)), ValueError, "batch: expected a pair .* got 3 entries"),
    ],
)
def test_bad_arguments(rule, arguments, error, message):
    model, batch = problem("mlp")
    arguments = {"model": model, "loss": cross_entropy, "batch": batch, **arguments}
    with pytest.raises(error, match=message):
        rule(**arguments)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(batch=lambda: None), TypeError, "batch: expected a pair .* got NoneType"),
        (dict(batch=lambda: (1,)), ValueError, "batch: expected a pair .* got 1 entries"),
        (dict(loss=lambda o, t: o.sum().item()), TypeError, r"loss: .* got float; .*item\(\)"),
        (dict(loss=lambda o, t: t.sum()), TypeError, r"loss: .* got torch.int64"),
        (dict(loss=lambda o, t: o[0, 0]), ValueError, r"loss: .* got shape \(2,\); .* mean"),
    ],
)
def test_bad_results(rule, arguments, error, message):
    model, batch = problem("mlp")
    arguments = {"model": model, "loss": cross_entropy, "batch": batch, **arguments}
    product = rule(**arguments)
    with pytest.raises(error, match=message):
        product(random_s(model))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("result", [{"logits": 1}, (), torch.ones(2, dtype=torch.int64)])
def test_bad_outputs(rule, result):
    class Model(nn.Linear):
        def forward(self, x):
            return result

    model = Model(2, 2)
    product = rule(model, squares, (torch.ones(2), torch.ones(2)))
    with pytest.raises(TypeError, match="model: expected it to return a floating-point tensor"):
        product(random_s(model))


@pytest.mark.parametrize("rule", RULES)
def test_complex_parameters(rule):
    model = nn.Linear(2, 2, dtype=torch.complex64)
    product = rule(model, squares, (torch.ones(2), torch.ones(2)))
    with pytest.raises(TypeError, match="model: complex parameters are not supported"):
        product({p: torch.zeros_like(p) for p in model.parameters()})
