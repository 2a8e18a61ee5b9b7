"""What is written is what is read: every dtype bit for bit, in any cut, at any world size."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from spectral_scale.checkpoint import format as file_format
from spectral_scale.checkpoint.format import DTYPE_CODES, create_file
from spectral_scale.checkpoint.reader import CheckpointReader
from spectral_scale.checkpoint.writer import save_checkpoint
from spectral_scale.errors import CheckpointError
from spectral_scale.parallel.chunks import TensorChunk, whole
from spectral_scale.parallel.collective import SingleProcess


def save(root, chunks, collective=None, step=7, state=None, open_new=create_file):
    return save_checkpoint(
        root,
        step,
        chunks,
        state=state or {},
        identity={},
        collective=collective or SingleProcess(),
        open_new=open_new,
    )


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(dtype, shape):
    """Any bit pattern: NaNs with payloads, denormals, infinities, negative zeros."""
    count = int(torch.tensor(shape).prod()) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_every_dtype_and_awkward_shape_comes_back_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    shapes = [(), (1,), (5,), (3, 7), (2, 3, 4), (0,), (4, 0), (0, 3)]
    tensors = {f"t/{i}": random_bits(dtype, shape) for i, shape in enumerate(shapes)}
    reader = CheckpointReader.open(save(tmp_path, [whole(n, t) for n, t in tensors.items()]))
    assert reader.tensors == {n: (dtype, tuple(t.shape)) for n, t in tensors.items()}
    for name, tensor in tensors.items():
        read = reader.read(name)
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(bits(read), bits(tensor))


def test_strided_views_and_parameters_are_stored_by_value(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(torch.ones(3))
    chunks = [
        whole("t", base.t()),
        whole("step", base[::2, 1::3]),
        whole("wide", torch.tensor([2.0]).expand(5)),
        whole("p", parameter),
    ]
    reader = CheckpointReader.open(save(tmp_path, chunks))
    assert torch.equal(reader.read("t"), base.t())
    assert torch.equal(reader.read("step"), base[::2, 1::3])
    assert torch.equal(reader.read("wide"), torch.full((5,), 2.0))
    assert not reader.read("p").requires_grad


def test_mixed_dtypes_in_one_file_are_a_valid_aligned_safetensors_file(tmp_path):
    tensors = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "long": torch.tensor([2**62, -1]),
        "single": torch.randn(5),
    }
    path = save(tmp_path, [whole(name, t) for name, t in tensors.items()])
    loaded = load_file(path / "rank_00000.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].data_ptr() % tensor.element_size() == 0


def test_state_and_identity_come_back_equal(tmp_path):
    state = {
        "lr": 0.1,
        "big": 2**70,
        "none": None,
        "text": "ü\n",
        "list": [1, [True]],
        "tuple": (1, 2),
    }
    reader = CheckpointReader.open(save(tmp_path, [], state=state))
    assert reader.state == {**state, "tuple": [1, 2]}
    assert reader.step == 7 and reader.tensors == {}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": torch.ones(1)}}, "state.a.b is a Tensor"),
        ({"a": [0.0, float("nan")]}, "state.a[1] is nan"),
        ({"a": float("inf")}, "state.a is inf"),
        ({3: 1}, "state has the key 3"),
        ({"a": {1}}, "state.a is a set"),
    ],
)
def test_what_json_would_change_is_refused_by_place(tmp_path, state, words):
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, [], state=state)
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_three_ragged_ranks_read_back_as_any_rectangle(tmp_path, run_ranks):
    tensor = torch.randn(7, 9)
    cuts = [(slice(0, 7), slice(0, 2)), (slice(0, 3), slice(2, 9)), (slice(3, 7), slice(2, 9))]

    def rank(collective):
        rows, columns = cuts[collective.rank]
        offset = (rows.start, columns.start)
        return save(tmp_path, [TensorChunk("w", tensor[rows, columns], (7, 9), offset)], collective)

    paths = run_ranks(3, rank)
    assert len(set(map(str, paths))) == 1
    reader = CheckpointReader.open(paths[0])
    assert reader.manifest.world_size == 3 and len(reader.manifest.files) == 3
    for top, bottom in itertools.combinations(range(8), 2):
        for left, right in itertools.combinations(range(10), 2):
            part = reader.read("w", (top, left), (bottom - top, right - left))
            assert torch.equal(part, tensor[top:bottom, left:right])


@st.composite
def reshardings(draw):
    """A shape, cuts along each dimension, which rank writes each cell, and rectangles to read."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple))
    cuts = [sorted({0, n, *draw(st.sets(st.integers(0, n), max_size=2))}) for n in shape]
    cells = list(itertools.product(*[list(itertools.pairwise(c)) for c in cuts]))
    writers = draw(st.lists(st.integers(0, 2), min_size=len(cells), max_size=len(cells)))
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        boxes.append(ends)
    return shape, list(zip(cells, writers, strict=True)), boxes


@given(case=reshardings())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_cut_written_by_three_ranks_reads_as_any_other(tmp_path_factory, run_ranks, case):
    shape, cells, boxes = case
    tensor = torch.randn(shape).bfloat16()
    root = tmp_path_factory.mktemp("reshard")

    def rank(collective):
        mine = [cell for cell, writer in cells if writer == collective.rank]
        chunks = [
            TensorChunk(
                "w", tensor[tuple(slice(*s) for s in cell)], shape, tuple(s[0] for s in cell)
            )
            for cell in mine
        ]
        return save(root, chunks, collective)

    with CheckpointReader.open(run_ranks(3, rank)[0]) as reader:
        assert torch.equal(reader.read("w"), tensor)
        for ends in boxes:
            offset, size = tuple(a for a, _ in ends), tuple(b - a for a, b in ends)
            wanted = tensor[tuple(slice(a, b) for a, b in ends)]
            assert torch.equal(reader.read("w", offset, size), wanted)


def test_ranks_without_chunks_write_no_file(tmp_path, run_ranks):
    empty = TensorChunk("w", torch.empty(0, 3), (2, 3), (2, 0))

    def rank(collective):
        chunks = [[], [whole("w", torch.ones(2, 3))], [empty]][collective.rank]
        return save(tmp_path, chunks, collective)

    path = run_ranks(3, rank)[0]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank_00001.safetensors"]
    assert torch.equal(CheckpointReader.open(path).read("w"), torch.ones(2, 3))


def test_a_rank_starts_another_file_at_the_size_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(file_format, "MAX_FILE_BYTES", 100)
    tensors = {f"t{i}": torch.randn(n) for i, n in enumerate([10, 10, 100, 5, 20, 1])}
    path = save(tmp_path, [whole(name, t) for name, t in tensors.items()])
    reader = CheckpointReader.open(path)
    assert sorted(reader.manifest.files) == [
        "rank_00000.safetensors",
        "rank_00000_1.safetensors",
        "rank_00000_2.safetensors",
        "rank_00000_3.safetensors",
    ]
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor)


W = whole("w", torch.ones(4, 3))
HALF = TensorChunk("w", torch.ones(2, 3), (4, 3), (0, 0))


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([W, W], "written twice"),
        ([HALF], "only 6 of 12 elements"),
        ([HALF, replace(HALF, offset=(1, 0))], "overlap"),
        ([HALF, replace(HALF, offset=(3, 0))], "exceed"),
        ([HALF, replace(HALF, offset=(2,))], "2 dimensions"),
        ([HALF, replace(HALF, offset=(2, 0), tensor=torch.ones(2, 3).half())], "must agree"),
        ([HALF, replace(HALF, offset=(2, 0), global_shape=(5, 3))], "must agree"),
        ([whole("w", torch.ones(2, dtype=torch.complex64))], "dtype torch.complex64"),
        ([whole("w", torch.ones(2, device="meta"))], "meta"),
        ([whole("a@0", torch.ones(2))], "name 'a@0'"),
        ([whole("", torch.ones(2))], "name ''"),
        ([whole("__metadata__", torch.ones(2))], "__metadata__"),
    ],
)
def test_chunks_that_do_not_make_whole_tensors_are_refused_before_writing(tmp_path, chunks, words):
    opened = []
    with pytest.raises(CheckpointError) as error:
        save(tmp_path, chunks, open_new=opened.append)
    assert words in str(error.value)
    assert opened == [] and list(tmp_path.iterdir()) == []


def test_the_rank_that_disagrees_is_named(tmp_path, run_ranks):
    def rank(collective):
        shape = (4, 3) if collective.rank < 2 else (4, 4)
        return save(
            tmp_path, [TensorChunk("w", torch.ones(1, 3), shape, (collective.rank, 0))], collective
        )

    for error in run_ranks(3, rank):
        assert isinstance(error, CheckpointError)
        assert "w: rank 2 has F32 [4, 4]" in str(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model/v",), "holds no tensor 'model/v'; nearest: model/w"),
        (("model/w", (0,)), "2 dimensions"),
        (("model/w", (0, 0), (38, 1)), "exceed"),
        (("model/w", (40, 0)), "negative"),
        (("model/w", (0, 0), (-1, 1)), "negative"),
    ],
)
def test_reads_outside_a_tensor_are_errors(checkpoints, arguments, words):
    reader = CheckpointReader.open(checkpoints.save(1))
    with pytest.raises(CheckpointError) as error:
        reader.read(*arguments)
    assert words in str(error.value)


def test_what_was_read_is_independent_of_the_file_and_of_other_reads(checkpoints):
    path = checkpoints.save(1)
    with CheckpointReader.open(path) as reader:
        first = reader.read("model/w")
        first.zero_()
        assert torch.equal(reader.read("model/w"), checkpoints.content(1)["model/w"])
    CheckpointReader.open(path)


@pytest.mark.parametrize("step", [-1, 100_000_000])
def test_steps_that_have_no_name_are_refused(tmp_path, step):
    with pytest.raises(CheckpointError, match="steps are 0 to 99999999"):
        save(tmp_path, [], step=step)
    assert list(tmp_path.iterdir()) == []
