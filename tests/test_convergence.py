"""``bench/convergence.py``: the ledger, the rules by which lr is tuned, schedules, the report."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def importable():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield
    for name in [n for n in sys.modules if n.split(".")[0] == "experiments"]:
        del sys.modules[name]


def short(name, steps=4):
    from experiments.tasks import TASKS

    return replace(TASKS[name], steps=steps, evaluations=2)


def study(method="adam", task="least-squares"):
    from experiments.methods import METHODS
    from experiments.protocol import Study

    task = short(task)
    text = {"name": "a text", "fingerprint": "0"} if task.stochastic else None
    return Study(task, METHODS[method], text)


def record(study, run, loss):
    curve = [[0, 4.0], [run.steps // 2, 2.0], [run.steps, loss]]
    return {
        "kind": "run", "definition": run.definition(study.text), "curve": curve,
        "loss": loss if math.isfinite(loss) else None, "seconds": 1.0, "stats": None,
        "evaluations": run.steps, "state_bytes": 2_000_000,
    }  # fmt: skip


def work_off(study, ledger, loss_of):
    """Everything that ``study`` asks for, with made-up losses; the runs in their order."""
    made = []
    while missing := study.missing(ledger):
        made.append(missing[0])
        ledger.add(record(study, missing[0], loss_of(missing[0])))
    return made


def parabola(centre):
    return lambda run: 1 + 0.1 * run.seed + math.log(run.lr / centre) ** 2


# ---------------------------------------------------------------------- ledger


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    from experiments.ledger import Ledger

    path, mine = tmp_path / "work.jsonl", study()
    run = mine.run(0.1, 0)
    Ledger(path).add(record(mine, run, 1.5))
    with path.open("a") as file:
        file.write('{"kind": "ru')
    ledger = Ledger(path)
    assert mine.loss(ledger, run) == 1.5
    ledger.add(record(mine, mine.run(0.2, 0), math.inf))
    again = Ledger(path)
    assert len(again.records) == 2 and mine.loss(again, mine.run(0.2, 0)) == math.inf


@pytest.mark.parametrize("change", [{"steps": 5}, {"clip": 1.0}, {"options": {"rows": 7}}])
def test_a_task_that_has_changed_is_run_again(tmp_path, change):
    from experiments.ledger import Ledger

    ledger, mine = Ledger(tmp_path / "work.jsonl"), study()
    ledger.add(record(mine, mine.run(0.1, 0), 1.0))
    changed = replace(mine, task=replace(mine.task, **change))
    assert mine.find(ledger, mine.run(0.1, 0))
    assert changed.find(ledger, changed.run(0.1, 0)) is None


def test_a_finished_study_is_not_run_again(tmp_path):
    from experiments.ledger import Ledger
    from experiments.pool import Pool
    from experiments.tasks import Texts

    path, mine = tmp_path / "work.jsonl", study()
    work_off(mine, Ledger(path), parabola(mine.method.grid(mine.task)[2]))
    before = path.read_text()
    pool = Pool([mine], Ledger(path), Texts(), processes=1, max_minutes=math.inf)
    assert pool._next() is None
    assert path.read_text() == before


# ---------------------------------------------------------------------- lr


def test_a_best_lr_inside_the_grid_goes_straight_to_the_test_seeds(tmp_path):
    from experiments.ledger import Ledger

    mine = study()
    grid = mine.method.grid(mine.task)
    made = work_off(mine, Ledger(tmp_path / "work.jsonl"), parabola(grid[1]))
    assert [(r.lr, r.seed) for r in made] == [(lr, 0) for lr in grid] + [(grid[1], 1), (grid[1], 2)]


@pytest.mark.parametrize("side", [0, -1])
def test_a_grid_grows_at_most_twice_each_way(tmp_path, side):
    from experiments.ledger import Ledger

    mine = study()
    grid = mine.method.grid(mine.task)
    far = grid[side] * 1000.0 ** (1 if side else -1)
    made = work_off(mine, Ledger(tmp_path / "work.jsonl"), parabola(far))
    tuned = [run.lr for run in made if run.seed == 0]
    assert len(tuned) == len(grid) + 2
    best = (min if side == 0 else max)(tuned)
    assert {run.lr for run in made if run.seed} == {best}


def test_a_method_that_always_diverges_ends(tmp_path):
    from experiments.ledger import Ledger

    mine = study()
    made = work_off(mine, Ledger(tmp_path / "work.jsonl"), lambda run: math.inf)
    assert {run.seed for run in made} == {0}


def test_contenders_are_tuned_and_run_over_shorter_horizons_too(tmp_path):
    from experiments.ledger import Ledger

    made = {}
    for method in ("kronecker", "adam"):
        mine = study(method, "lstm")
        ledger, centre = Ledger(tmp_path / f"{method}.jsonl"), mine.method.grid(mine.task)[2]
        # The shorter, the higher the best lr: one point up at the shortest horizon.
        made[method] = work_off(
            mine, ledger, lambda run, c=centre: parabola(2.5 * c if run.horizon < 0.5 else c)(run)
        )
        assert mine.finished(ledger) and len(made[method]) == mine.most_runs()
    shortest = [(r.lr, r.seed) for r in made["kronecker"] if r.horizon == 0.2]
    assert [seed for _, seed in shortest] == [0, 0, 0, 1, 2]
    centre = made["kronecker"][2].lr
    assert [lr for lr, seed in shortest if seed] == pytest.approx([2.5 * centre] * 2)
    assert {r.horizon for r in made["kronecker"]} == {1.0, 0.2, 0.5, 0.65, 0.75}
    assert all(r.horizon == 1.0 for r in made["adam"])


def test_a_given_lr_is_not_tuned_and_a_trial_not_tested(tmp_path):
    from experiments.ledger import Ledger

    mine, ledger = study("untuned", "lstm"), Ledger(tmp_path / "given.jsonl")
    made = work_off(mine, ledger, parabola(1.0))
    assert [(r.lr, r.seed) for r in made] == [(0.01, 0), (0.01, 1), (0.01, 2)]
    assert study("unit steps", "tanh").grid() == study("unit steps", "lstm").grid()
    mine, ledger = study("unit steps", "lstm"), Ledger(tmp_path / "trial.jsonl")
    made = work_off(mine, ledger, parabola(mine.grid()[1]))
    assert [(r.lr, r.seed) for r in made] == [(lr, 0) for lr in mine.grid()]


def test_a_block_size_is_tuned_around_the_tasks_own_lr_and_not_tested(tmp_path):
    from experiments.ledger import Ledger

    mine = study("block-64", "transformer")
    assert mine.grid() == study("kronecker", "transformer").grid()[1:-1]
    made = work_off(mine, Ledger(tmp_path / "work.jsonl"), parabola(mine.grid()[1]))
    assert [(r.lr, r.seed) for r in made] == [(lr, 0) for lr in mine.grid()]


@pytest.mark.parametrize("rule", ["unit", "trust", "distance"])
def test_rescaled_steps_have_the_size_that_the_rule_gives(rule):
    import torch
    from experiments.scaled import Rescaled, rms

    from adaqn_cuda import AdaQN

    w = torch.nn.Parameter(torch.linspace(1, 2, 12, dtype=torch.float64).view(4, 3))
    start = w.detach().clone()
    optimizer = Rescaled(AdaQN([w], lr=0.1), rule)
    for step in range(1, 4):
        before = w.detach().clone()
        w.grad = torch.cos(step * torch.arange(12, dtype=torch.float64)).view(4, 3)
        optimizer.step()
        size = rms(w.detach() - before).item()
        distance = max(1e-3, rms(before - start).item())
        expected = {
            "unit": 0.1, "trust": 0.1 * rms(before).item(), "distance": 0.1 * distance / step**0.5,
        }  # fmt: skip
        assert size == pytest.approx(expected[rule], rel=1e-9)


def test_relative_steps_are_multiples_of_the_parameters():
    import torch
    from experiments.scaled import Rescaled, rms

    from adaqn_cuda import AdaQN

    start = torch.linspace(1, 2, 12).view(4, 3)
    w, twin = (torch.nn.Parameter(start.clone()) for _ in range(2))
    w.grad = twin.grad = torch.cos(torch.arange(12.0)).view(4, 3)
    Rescaled(AdaQN([w], lr=0.1), "relative").step()
    AdaQN([twin], lr=0.1).step()
    torch.testing.assert_close(w - start, rms(start) * (twin - start))


# ---------------------------------------------------------------------- peers


@pytest.mark.parametrize(
    "method",
    ["soap", "soap, our settings", "psgd-kron", "shampoo", "shampoo, our settings", "muon"],
)
@pytest.mark.parametrize("task", ["regression", "pinn"])
def test_a_peer_makes_the_loss_fall_at_some_lr_of_its_grid(method, task):
    from experiments.methods import METHODS
    from experiments.training import Run, execute

    task, method = short(task, 30), METHODS[method]
    results = [execute(Run(task, method, lr, seed=0), None) for lr in method.grid(task)[:3]]
    assert all(r["loss"] is not None and r["state_bytes"] > 0 for r in results)
    assert min(r["loss"] for r in results) < 0.7 * results[0]["curve"][0][1]


def gradients(count, *shape):
    import torch

    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def displacements(optimizer, w, grads):
    """What each step at lr 1 moves ``w`` by."""
    found = []
    for g in grads:
        before = w.detach().clone()
        w.grad = g
        optimizer.step()
        found.append(w.detach() - before)
    return found


def parameter(*shape):
    import torch

    return torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def test_soap_without_bases_is_adam_that_skips_the_first_gradient():
    import torch
    from experiments.peers import SOAP

    grads, (w, twin) = gradients(4, 5, 3), (parameter(5, 3) for _ in range(2))
    mine = displacements(SOAP([w], lr=1.0, betas=(0.9, 0.99), max_side=1), w, grads)
    adam = torch.optim.Adam([twin], lr=1.0, betas=(0.9, 0.99))
    assert mine[0].count_nonzero() == 0
    torch.testing.assert_close(mine[1:], displacements(adam, twin, grads[1:]))


def test_soap_turns_with_the_gradients():
    """In eigenbases, unlike Adam: what is turned at the start stays turned."""
    import torch
    from experiments.peers import SOAP

    left, right, *grads = gradients(10, 4, 4)
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q
    w, twin = parameter(4, 4), parameter(4, 4)
    options = dict(lr=1.0, interval=2)
    mine = displacements(SOAP([w], **options), w, grads)
    turned = displacements(SOAP([twin], **options), twin, [left @ g @ right for g in grads])
    torch.testing.assert_close([left @ m @ right for m in mine], turned)


def test_what_soap_knows_of_a_column_stays_with_it_when_columns_are_sorted():
    import torch
    from experiments.peers.soap import refresh

    factor, v = torch.tensor([1.0, 3.0, 2.0]).diag(), torch.arange(6.0).view(3, 2)
    state = {"factors": {0: factor}, "bases": {0: torch.eye(3)}, "v": v}
    refresh(state)
    torch.testing.assert_close(state["bases"][0].abs(), torch.eye(3)[:, [1, 2, 0]])
    torch.testing.assert_close(state["v"], v[[1, 2, 0]])


def test_gates_have_a_state_of_their_own():
    import torch
    from experiments.peers import SOAP

    grads = gradients(4, 6, 3)
    w, upper, lower = parameter(6, 3), parameter(3, 3), parameter(3, 3)
    whole = displacements(SOAP([w], lr=1.0, blocks={w: 2}), w, grads)
    parts = [
        displacements(SOAP([p], lr=1.0), p, [g.chunk(2)[i] for g in grads])
        for i, p in enumerate((upper, lower))
    ]
    torch.testing.assert_close(whole, [torch.cat(pair) for pair in zip(*parts, strict=True)])


def test_shampoo_takes_roots_of_both_factors_and_the_length_of_adam():
    import torch
    from experiments.peers import Shampoo

    (g,) = gradients(1, 3, 3)
    w, twin = parameter(3, 3), parameter(3, 3)
    (move,) = displacements(Shampoo([w], lr=1.0, interval=1), w, [g])
    (adam,) = displacements(torch.optim.Adam([twin], lr=1.0), twin, [g])
    u, _, v = torch.linalg.svd(g)  # (G G^T)^(-1/4) G (G^T G)^(-1/4)
    torch.testing.assert_close(move, -u @ v / 3**0.5 * adam.norm(), rtol=1e-6, atol=1e-6)


def test_shampoo_starts_as_adam_and_cuts_long_sides():
    import torch
    from experiments.peers import Shampoo

    grads, (w, twin) = gradients(6, 5, 3), (parameter(5, 3) for _ in range(2))
    options = dict(lr=1.0, interval=4)
    mine = displacements(Shampoo([w], **options, max_side=3), w, grads)
    adam = displacements(torch.optim.Adam([twin], lr=1.0), twin, grads)
    torch.testing.assert_close(mine[:3], adam[:3])
    tile = parameter(2, 3)
    alone = displacements(Shampoo([tile], **options), tile, [g[3:] for g in grads])
    torch.testing.assert_close([m[3:] for m in mine], alone)


@pytest.mark.parametrize("max_side", [10, 5, 1])
def test_psgd_whitens_the_gradient(max_side):
    """Rows of any size: at P = E[g g^T]^(-1/2) all move alike."""
    import torch
    from experiments.peers import PSGDKron

    left = torch.logspace(-0.4, 0.4, 8, dtype=torch.float64)
    grads = [left[:, None] * z for z in gradients(700, 8, 5)]
    w = parameter(8, 5)
    optimizer = PSGDKron([w], lr=1.0, momentum=0.0, max_side=max_side)
    late = torch.stack(displacements(optimizer, w, grads)[400:])
    rows = late.square().mean((0, 2)).sqrt()
    assert rows.min() > 0.6 and rows.max() < 1.6


def test_muon_is_that_of_torch_up_to_its_bfloat16():
    import torch
    from experiments.peers import Muon

    for shape in ((6, 4), (4, 6)):
        grads, (w, twin) = gradients(3, *shape), (parameter(*shape) for _ in range(2))
        options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
        theirs = displacements(torch.optim.Muon([twin], lr=1.0, **options), twin, grads)
        mine = displacements(Muon([w], lr=1.0), w, grads)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.02)


def test_memory_of_the_state_counts_shared_memory_once():
    import torch
    from experiments.training import state_bytes

    whole, other = torch.zeros(10), torch.zeros(3, dtype=torch.float64)
    state = {"a": [whole[:4], {"b": whole[4:]}], "step": 3, "c": (other,)}
    assert state_bytes(state) == 40 + 24


# ---------------------------------------------------------------------- runs


def test_weight_decay_is_that_of_adamw():
    import torch
    from experiments.methods import METHODS
    from experiments.training import Run, Training

    task = replace(short("regression", 20), weight_decay=0.3)
    run = Run(task, METHODS["adam"], 0.1, seed=0)
    mine = Training(task.build(0), run)
    twin = Training(
        replace(task, weight_decay=0.0).build(0), replace(run, task=short("regression", 20))
    )
    twin.optimizer = torch.optim.AdamW(twin.problem.model.parameters(), lr=0.1, weight_decay=0.3)
    losses = [(mine.step(), twin.step()) for _ in range(20)]
    assert all(a == pytest.approx(b, rel=1e-12) for a, b in losses)
    assert task.definition() != short("regression", 20).definition()


def test_schedule():
    from experiments.training import schedule

    values = [schedule(step, 100, "linear") for step in range(100)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[5] == 1.0 and values[99] == pytest.approx(1 / 95)
    assert all(a > b for a, b in zip(values[5:], values[6:], strict=False))
    assert schedule(99, 100, "constant") == 1.0


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_a_run_keeps_to_its_budget_and_is_reproducible(method):
    from experiments.methods import METHODS
    from experiments.training import Run, execute

    run = Run(short("least-squares", 20), METHODS[method], 0.5, seed=1)
    first, second = execute(run, None), execute(run, None)
    assert first["curve"] == second["curve"] and first["loss"] < first["curve"][0][1]
    assert 20 <= first["evaluations"] <= 20 + (40 if method == "lbfgs" else 0)


def test_a_run_that_explodes_ends_early():
    from experiments.methods import METHODS
    from experiments.training import Run, execute

    run = Run(replace(short("least-squares", 300), patience=1), METHODS["sgd"], 100.0, seed=0)
    result = execute(run, None)
    assert result["loss"] is None and result["evaluations"] < 300


def test_newton_finds_the_optimum():
    import torch
    from experiments.deterministic import newton_minimum
    from experiments.tasks import TASKS

    start = torch.full((2, 3), 3.0, dtype=torch.float64)
    found = newton_minimum(lambda w: (w.exp() - 2 * w).sum(), start)
    assert found == pytest.approx(6 * (2 - 2 * math.log(2)), abs=1e-13)
    problem = TASKS["regression"].build(seed=0)
    assert problem.optimum < float(problem.loss().detach()) == pytest.approx(math.log(5))


# ---------------------------------------------------------------------- report


def test_crossing_lies_on_the_line_between_two_points():
    from experiments.results import crossing

    curve = [(0, 4.0), (10, 2.0), (20, 1.0)]
    assert crossing(curve, 3.0) == pytest.approx(5.0)
    assert crossing(curve, 1.0) == pytest.approx(20.0)
    assert crossing(curve, 0.5) is None


def test_a_report_says_who_wins(tmp_path):
    from experiments import report, timing
    from experiments.ledger import Ledger
    from experiments.methods import METHODS

    offsets = {"adam": 0.3, "sgd": 0.4, "diagonal": 0.0, "kronecker": 0.1, "untuned": -0.9}
    offsets["unit steps"] = 0.05
    ledger = Ledger(tmp_path / "work.jsonl")
    for task in ("least-squares", "lstm"):
        for method, offset in offsets.items():
            mine = study(method, task)
            best = mine.grid()[len(mine.grid()) // 2]
            work_off(mine, ledger, lambda run, b=best, o=offset: parabola(b)(run) + o)
            ledger.add(
                {
                    "kind": "time", "ms": 2.0, "iqr": 0.1, "threads": 2,
                    "definition": timing.definition(mine.task, mine.method),
                }
            )  # fmt: skip
    tasks, methods = [short("least-squares"), short("lstm")], [METHODS[m] for m in offsets]
    written = report.write(
        ledger, tasks, [*methods, METHODS["muon"]], tmp_path / "results", "a command"
    )
    assert sorted(path.name for path in written) == [
        "convergence-deterministic.png", "convergence-loss.png", "convergence-lr.png",
        "convergence.json", "convergence.md",
    ]  # fmt: skip
    assert all(path.stat().st_size > 500 for path in written)
    entry = json.loads(written[0].read_text())["tasks"]["lstm"]["methods"]["diagonal"]
    assert entry["losses"] == [1.1, 1.2] and entry["seconds"] == 0.008
    assert entry["steps_share"] < 1 and entry["wall_share"] == pytest.approx(entry["steps_share"])
    text = written[1].read_text()
    assert "AdaQN (`diagonal`) wins with 1.150; `adam`, the best of the others, ends 0.300" in text
    assert "Not finished: `muon`." in text
    # What was not tuned does not win, and what was only tried has no losses on the test seeds.
    assert "| **untuned** | 0.01 (given) | 0.200 | 0.300 |" in text
    assert "**unit steps**" not in text and "\n| unit steps | 0.005: 1.050 | 1 |\n" in text


def test_a_report_shows_what_a_block_size_costs(tmp_path):
    from experiments import report
    from experiments.ledger import Ledger
    from experiments.methods import BLOCK_SIZES, METHODS, block_label

    ledger = Ledger(tmp_path / "work.jsonl")
    methods = [METHODS[f"block-{block_label(size)}"] for size in BLOCK_SIZES]
    for offset, method in enumerate(methods):
        mine = study(method.name, "transformer")
        work_off(mine, ledger, lambda run, s=mine, o=offset: parabola(s.grid()[1])(run) + o)
    written = report.write(ledger, [short("transformer")], methods, tmp_path, "a command")
    assert sorted(path.name for path in written) == [
        "convergence-blocks.png", "convergence.json", "convergence.md"
    ]  # fmt: skip
    text = written[1].read_text()
    assert "| 32 | 0.004 | 1.000 | – | 250 | 2 |" in text
    assert "| whole | 0.004 | 5.000 | – | 250 | 2 |" in text


def test_the_horizon_that_counts_is_chosen_on_the_tuning_seed():
    from experiments.results import add_reach, promising

    def shorter(tuned, tested):
        return {"lr": 0.1, "tuning": [[0.1, tuned], [0.2, 9.0]], "losses": [tested] * 2}

    target = {"lr": 0.5, "tuning": [[0.5, 2.0]], "mean": 2.0, "ms": None, "seconds": None}
    entry = {
        "shorter": {"0.2": shorter(2.1, 1.0), "0.5": shorter(1.9, 2.2), "0.75": shorter(1.8, 1.9)},
        "curves": {
            "1.0": [(0, 4.0), (100, 1.0)], "0.2": [(0, 4.0), (20, 1.0)],
            "0.5": [(0, 4.0), (50, 2.2)], "0.75": [(0, 4.0), (75, 1.9)],
        },
        "ms": None,
    }  # fmt: skip
    assert promising(entry, target) == "0.5"
    add_reach(entry, short("lstm", 100), target)
    # Neither the lucky run at 0.2 nor the one at 0.75; that at 0.5 misses the target.
    assert entry["steps_to_target"] == pytest.approx(200 / 3)
    entry["curves"]["0.5"] = [(0, 4.0), (50, 1.5)]
    add_reach(entry, short("lstm", 100), target)
    assert entry["steps_to_target"] == pytest.approx(40)


def test_the_untuned_lr_is_the_default():
    import inspect

    from experiments.methods import METHODS

    from adaqn_cuda import AdaQN

    defaults = {n: p.default for n, p in inspect.signature(AdaQN).parameters.items()}
    assert METHODS["untuned"].lr == defaults["lr"]
    tuned = {n: v for n, v in METHODS["kronecker"].options.items() if n != "from_problem"}
    assert tuned == {name: defaults[name] for name in tuned}
