"""Where Kronecker factors lie: matrices, pieces of their sides, row blocks, and the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Size, nn

from adaqn_cuda.distributed.sharding import Shards
from adaqn_cuda.state.blocks import as_blocks, check_blocks, heights, rnn_blocks
from adaqn_cuda.state.plan import Column, Cut, Plan, pieces

settings.register_profile("plan", deadline=None, max_examples=200)
settings.load_profile("plan")


def plan(shapes, *, blocks=None, block_size=4, max_vector_dim=4) -> Plan:
    shapes = [Size(shape) for shape in shapes]
    blocks = blocks or [1] * len(shapes)
    cuts = [Cut(heights(s, as_blocks(b)), block_size) for s, b in zip(shapes, blocks, strict=True)]
    return Plan(shapes, cuts, max_vector_dim)


def factored_sides(p: Plan) -> list[list[bool]]:
    """For every row of the table, whether there are left and right factors."""
    return (p.table[:, [Column.LEFT, Column.RIGHT]] >= 0).tolist()


# --------------------------------------------------------------------------- pieces


@given(st.integers(1, 300), st.integers(1, 40))
def test_pieces_are_even_and_the_longer_ones_come_first(side, count):
    assert pieces(side, count) == [len(part) for part in torch.arange(side).tensor_split(count)]


@pytest.mark.parametrize(
    ("side", "block_size", "expected"),
    [(7, 3, [3, 2, 2]), (8, 3, [3, 3, 2]), (9, 3, [3, 3, 3]), (3, 3, [3]), (4, 3, [2, 2]),
     (5, 2, [2, 2, 1]), (129, 128, [65, 64])],
)  # fmt: skip
def test_sides_longer_than_the_block_size_are_cut_evenly(side, block_size, expected):
    p = plan([(side, 2), (2, side)], block_size=block_size)
    two = pieces(2, int(p.table[0, Column.COLUMN_PIECES]))
    assert [length for _, length in p.squares()] == [*expected, *two, *two, *expected]
    assert p.table[0, Column.ROW_PIECES] == p.table[1, Column.COLUMN_PIECES] == len(expected)


# --------------------------------------------------------------------------- the table


@st.composite
def problems(draw):
    """Shapes, their blocks (a number, or unequal heights), and the limits."""
    shapes = draw(st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), max_size=6))
    blocks = []
    for shape in shapes:
        if len(shape) < 2 or shape[0] == 0:
            blocks.append(1)
            continue
        cuts = sorted(draw(st.sets(st.integers(1, shape[0]), max_size=3)) | {shape[0]})
        rows = [stop - start for start, stop in zip([0, *cuts], cuts, strict=False)]
        blocks.append(draw(st.sampled_from([rows, 1, shape[0]])))
    block_size = draw(st.one_of(st.none(), st.integers(1, 8)))
    return shapes, blocks, block_size, draw(st.integers(1, 8))


@given(problems())
def test_the_table_covers_every_element_once_and_in_order(problem):
    shapes, blocks, block_size, max_vector_dim = problem
    p = plan(shapes, blocks=blocks, block_size=block_size, max_vector_dim=max_vector_dim)
    assert p.table.shape == (len(p.table), len(Column))
    assert (p.table.dtype, p.table.device.type) == (torch.int64, "cpu")
    assert p.table.is_contiguous()
    owners = [i for i, shape in enumerate(shapes) for _ in range(Size(shape).numel())]
    covered = []
    for row in p.table.tolist():
        assert row[Column.START] == len(covered)
        covered += [row[Column.PARAM]] * (row[Column.ROWS] * row[Column.COLUMNS])
        for side, count in ((Column.ROWS, Column.ROW_PIECES), (Column.COLUMNS, 4)):
            cut = (block_size or 1) > 1 and min(row[Column.ROWS], row[Column.COLUMNS]) > 1
            assert row[count] == (-(-row[side] // block_size) if cut else 1)
    assert covered == owners


@given(problems())
def test_matrices_are_row_blocks_by_the_rest(problem):
    shapes, blocks, _, _ = problem
    p = plan(shapes, blocks=blocks)
    rows = p.table.tolist()
    for i, (shape, given_blocks) in enumerate(zip(shapes, blocks, strict=True)):
        own = [row[Column.ROWS : Column.ROW_PIECES] for row in rows if row[Column.PARAM] == i]
        numel = Size(shape).numel()
        if numel == 0:
            assert own == []
        elif len(shape) < 2:
            assert own == [[numel, 1]]
        else:
            width = numel // shape[0]
            high = heights(Size(shape), as_blocks(given_blocks))
            too_long = [min(a, width) == 1 and a * width not in (2, 3, 4) for a in high]
            pairs = zip(high, too_long, strict=True)
            assert own == [[a * width, 1] if long else [a, width] for a, long in pairs]


@given(problems())
def test_factors_lie_one_after_the_other(problem):
    """Left pieces, then right ones, matrix after matrix; a parameter's are a span."""
    shapes, blocks, block_size, max_vector_dim = problem
    p = plan(shapes, blocks=blocks, block_size=block_size, max_vector_dim=max_vector_dim)
    squares, stop, ends = [], 0, [0] * len(shapes)
    for row in p.table.tolist():
        for place, side, count in ((5, 1, 3), (6, 2, 4)):
            if row[place] == -1:
                continue
            assert row[place] == stop
            for part in torch.arange(row[side]).tensor_split(row[count]):
                squares.append((stop, len(part)))
                stop += len(part) ** 2
        ends[row[Column.PARAM]] = stop
    assert list(p.squares()) == squares
    assert p.factors == stop
    starts = [span.start for span in p.spans]
    assert starts == [0, *(span.stop for span in p.spans)][:-1]
    assert all(e in (0, span.stop) for e, span in zip(ends, p.spans, strict=True))
    assert not p.spans or p.spans[-1].stop == stop


@given(problems())
def test_sides_of_more_than_one_element_have_factors(problem):
    shapes, blocks, block_size, max_vector_dim = problem
    p = plan(shapes, blocks=blocks, block_size=block_size, max_vector_dim=max_vector_dim)
    found = [[False, False] for _ in shapes]
    for row, sides in zip(p.table.tolist(), factored_sides(p), strict=True):
        rows, columns = row[Column.ROWS : Column.ROW_PIECES]
        limit = min(block_size or 1, max_vector_dim)
        wanted = (block_size or 1) > 1 and (min(rows, columns) > 1 or rows * columns <= limit)
        assert sides == [wanted and row[side] > 1 for side in (Column.ROWS, Column.COLUMNS)]
        for side in (0, 1):
            found[row[Column.PARAM]][side] |= sides[side]
    assert p.sides == [sum(sides) for sides in found]


@pytest.mark.parametrize(
    ("shape", "blocks", "expected"),
    [((6, 4), 1, 2), ((6, 4), 6, 1), ((6, 4), [1, 5], 2), ((6, 4), [5, 1], 2), ((6, 1), [5, 1], 0),
     ((6, 1), [4, 2], 1), ((1, 5), 1, 0),
     ((6, 1), 6, 0), ((1, 4), 1, 1), ((3,), 1, 1), ((5,), 1, 0), ((), 1, 0), ((0, 3), 1, 0)],
)  # fmt: skip
def test_sides_of_a_parameter_with_factors(shape, blocks, expected):
    """Of row blocks, any may have them."""
    assert plan([shape], blocks=[blocks]).sides == [expected]


@pytest.mark.parametrize(
    ("block_size", "max_vector_dim", "factored"), [(9, 5, 5), (4, 9, 4), (None, 9, 1)]
)
def test_vectors_have_a_limit_of_their_own_below_that_of_matrices(
    block_size, max_vector_dim, factored
):
    shapes = [(n,) for n in range(1, 12)]
    p = plan(shapes, block_size=block_size, max_vector_dim=max_vector_dim)
    assert factored_sides(p) == [[1 < n <= factored, False] for n in range(1, 12)]
    assert p.table[:, Column.ROW_PIECES].eq(1).all()


@pytest.mark.parametrize("block_size", [None, 1])
def test_without_a_block_size_a_parameter_is_one_row_without_factors(block_size):
    """Pieces of one element would have factors that are the identity."""
    shapes = [(6, 4), (3, 2, 2), (3,), (0, 2), ()]
    p = plan(shapes, blocks=[[1, 5], 3, 1, 1, 1], block_size=block_size)
    assert p.table.tolist() == [
        [0, 24, 1, 1, 1, -1, -1, 0, 0],
        [24, 12, 1, 1, 1, -1, -1, 1, 0],
        [36, 3, 1, 1, 1, -1, -1, 2, 0],
        [39, 1, 1, 1, 1, -1, -1, 4, 0],
    ]
    assert p.factors == 0
    assert list(p.squares()) == []


# --------------------------------------------------------------------------- shards


class Mesh:
    """What :class:`Shards` asks of a device mesh."""

    def __init__(self, count):
        self.count = count

    def size(self, dim):
        return self.count


@given(problems(), st.integers(1, 4))
def test_shards_have_the_matrices_of_the_whole_between_them(problem, count):
    """In its order and with its turns, and room for as many factors in each."""
    shapes, blocks, block_size, max_vector_dim = problem
    shapes, shards = [Size(shape) for shape in shapes], Shards(Mesh(count), 0)
    rows = [heights(s, as_blocks(b)) for s, b in zip(shapes, blocks, strict=True)]
    whole = Plan(shapes, [Cut(shards.cut(own), block_size) for own in rows], max_vector_dim)
    ranges = [[shards.elements(shape, rank) for shape in shapes] for rank in range(count)]
    parts = [whole.part(ranges, rank) for rank in range(count)]
    assert len({tuple(map(str, part.spans)) for part in parts}) == 1

    def without_places(row):
        factored = [row[side] >= 0 for side in (Column.LEFT, Column.RIGHT)]
        return [*row[Column.ROWS : Column.LEFT], *factored, row[Column.TURN]]

    for param in range(len(shapes)):
        found = [row for part in parts for row in part.table.tolist() if row[Column.PARAM] == param]
        expected = [row for row in whole.table.tolist() if row[Column.PARAM] == param]
        assert sum(row[Column.ROWS] * row[Column.COLUMNS] for row in found) == shapes[param].numel()
        factored = [[without_places(r) for r in rs if max(r[5:7]) >= 0] for rs in (found, expected)]
        assert factored[0] == factored[1]
    for part, own in zip(parts, ranges, strict=True):
        sizes = part.table[:, Column.ROWS] * part.table[:, Column.COLUMNS]
        assert part.table[:, Column.START].tolist() == [0, *sizes.cumsum(0).tolist()][: len(sizes)]
        assert sizes.sum() == sum(map(len, own))


# --------------------------------------------------------------------------- row blocks


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.inner = nn.ModuleDict({"gru": nn.GRU(8, 5), "cell": nn.GRUCell(5, 2)})
        self.projected = nn.LSTM(2, 4, proj_size=3)
        self.plain = nn.RNN(3, 2)
        self.lstm_cell = nn.LSTMCell(2, 2)
        self.head = nn.Linear(2, 4)


def test_rnn_blocks_finds_the_gates():
    model = Model()
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: count for p, count in rnn_blocks(model).items()}
    expected = {
        f"lstm.weight_{kind}_l{layer}{direction}": 4
        for kind in ("ih", "hh")
        for layer in (0, 1)
        for direction in ("", "_reverse")
    }
    expected |= {f"inner.gru.weight_{kind}_l0": 3 for kind in ("ih", "hh")}
    expected |= {f"inner.cell.weight_{kind}": 3 for kind in ("ih", "hh")}
    expected |= {f"projected.weight_{kind}_l0": 4 for kind in ("ih", "hh")}
    expected |= {f"lstm_cell.weight_{kind}": 4 for kind in ("ih", "hh")}
    assert found == expected
    check_blocks(rnn_blocks(model), model.parameters())


P, Q, NUMBER = (nn.Parameter(torch.zeros(shape)) for shape in ((6, 2), (4, 2), ()))


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([4], TypeError, r"blocks: expected a mapping .* got \[4\]; pass"),
        ({"weight": 4}, TypeError, r"blocks: expected parameters as keys, got 'weight'; use"),
        ({P: 2.0}, TypeError, r"blocks: expected an int >= 1.*\(6, 2\), got 2.0; give"),
        ({P: True}, TypeError, r"got True; give"),
        ({P: "33"}, TypeError, r"blocks: expected an int >= 1.*\(6, 2\), got '33'; give"),
        ({P: None}, TypeError, r"got None; give"),
        ({P: []}, TypeError, r"\(6, 2\), got \[\]; give"),
        ({P: [3, 3.0]}, TypeError, r"\(6, 2\), got \[3, 3.0\]; give"),
        ({P: [5, True]}, TypeError, r"got \[5, True\]; give"),
        ({P: 0}, ValueError, r"blocks: expected an int >= 1.*\(6, 2\), got 0; give"),
        ({P: [6, 0]}, ValueError, r"blocks: expected an int >= 1.*got \[6, 0\]; give"),
        ({P: [7, -1]}, ValueError, r"got \[7, -1\]; give"),
        ({P: 4}, ValueError, r"blocks: got 4 .*\(6, 2\).* use a divisor of 6, or list"),
        ({P: [3, 2]}, ValueError, r"blocks: got \[3, 2\] .*\(6, 2\): blocks of 5 rows.* it has 6"),
        ({Q: 2}, ValueError, r"blocks: got 2 .*\(4, 2\) that is not among .*; pass"),
        ({NUMBER: 1}, ValueError, r"blocks: got 1 .*without dimensions.*leave"),
    ],
)
def test_check_blocks_names_value_and_remedy(blocks, error, message):
    with pytest.raises(error, match=message):
        check_blocks(blocks, [P, NUMBER])


def test_check_blocks_accepts():
    for blocks in ({}, {P: 1}, {P: 3}, {P: 6}, {P: [6]}, {P: [1, 3, 2]}, {P: (5, 1)}):
        check_blocks(blocks, iter([P, NUMBER]))


def test_heights_of_row_blocks():
    shape = Size((6, 2))
    assert heights(shape, as_blocks(3)) == (2, 2, 2)
    assert heights(shape, as_blocks((1, 3, 2))) == (1, 3, 2)
    assert heights(Size(()), 1) == (1,)
    assert heights(Size((5,)), 1) == (5,)
