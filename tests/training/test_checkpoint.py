"""Checkpoints: exact round trips, refusals, damage, and which checkpoints stay."""

import collections
import enum
import hashlib
import json
import math
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from drgr.errors import CheckpointError
from drgr.training.checkpoint import latest_checkpoint, load_checkpoint, read_step, save_checkpoint

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def describe(value):
    """A plain value that is equal exactly when two states are: bits, types and order."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ("tensor", str(value.dtype), tuple(value.shape), data)
    if isinstance(value, dict):
        return ("dict", [(type(key), key, describe(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [describe(item) for item in value])
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    return (type(value), value)


def save(directory, state, *, step=1, keep=10, fingerprint="abc", **options):
    return save_checkpoint(
        directory, step=step, state=state, fingerprint=fingerprint, keep=keep, **options
    )


def load(path, fingerprint="abc"):
    return load_checkpoint(path, fingerprint=fingerprint)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    num_bytes = math.prod(shape) * dtype.itemsize
    high = 1 if dtype == torch.bool else 255
    raw = draw(st.lists(st.integers(0, high), min_size=num_bytes, max_size=num_bytes))
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.t() if tensor.dim() == 2 and draw(st.booleans()) else tensor


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), tensors()
)
KEYS = st.text(max_size=4) | st.integers() | st.sampled_from(["__metadata__", "a.b", "1", 1, "a"])
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(KEYS, inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(state=STATES, shard_bytes=st.sampled_from([1, 16, 2**28]))
def test_any_state_comes_back_bit_for_bit(state, shard_bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder), state, shard_bytes=shard_bytes)
        assert describe(load(path)) == describe(_with_one_nan(state))


def _with_one_nan(value):
    """What is promised of a Python float that is not a number: it comes back as one."""
    if isinstance(value, dict):
        return {key: _with_one_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_one_nan(item) for item in value)
    return math.nan if isinstance(value, float) and math.isnan(value) else value


def test_hard_values_by_hand(tmp_path):
    state = {
        "bfloat16": torch.tensor([1.5, math.nan, -math.inf, -0.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4, dtype=torch.bool),
        "floats": [math.inf, -math.inf, math.nan, -0.0, 5e-324, 0.1, 1e16, 5.0],
        "integers": [2**200, -1, 0, True],
        "keys": {1: "int", "1": "str", -7: None},
        "pair": (0.9, 0.95),
        "text": 'line\nbreak "quoted" \u00e9 \U0001f600 \x00',
    }
    path = save(tmp_path, state)
    loaded = load(path)
    assert describe(loaded) == describe(state)
    assert type(loaded["floats"][-1]) is float
    assert type(loaded["integers"][-1]) is bool
    assert read_step(path) == 1
    assert path == tmp_path / "step-00000001"


def test_strided_negated_and_half_used_memory_comes_back_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "transposed": base.t(),
        "rows": base[1:],
        "expanded": torch.tensor([2.0]).expand(5),
        "negated": torch.complex(base, base).conj().imag,
        "gradient": base.clone().requires_grad_(),
        "parameter": nn.Parameter(base + 1),
    }
    loaded = load(save(tmp_path, state))
    assert all(torch.equal(loaded[key], state[key].detach()) for key in state)
    assert all(type(tensor) is torch.Tensor for tensor in loaded.values())
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_tied_weights_are_stored_once_and_stay_one_tensor(tmp_path):
    tied = torch.arange(100.0)
    state = {"embed": tied, "head": tied.view(100), "half": tied[:50], "other": tied.clone()}
    path = save(tmp_path, state)
    loaded = load(path)
    assert loaded["embed"] is loaded["head"]
    assert describe(loaded) == describe(state)
    loaded["embed"].zero_()
    assert torch.equal(loaded["half"], tied[:50])
    assert torch.equal(loaded["other"], tied)
    assert set(load_file(path / "tensors-00000.safetensors")) == {"embed", "half", "other"}


def test_views_that_differ_in_strides_dtype_or_shape_stay_apart(tmp_path):
    square = torch.arange(4.0).reshape(2, 2)
    complex_square = torch.complex(square, square)
    state = {
        "square": square,
        "transposed": square.t(),
        "flat": square.view(4),
        "bits": square.view(torch.int32),
        "imaginary": complex_square.imag,
        "negated": complex_square.conj().imag,
    }
    assert describe(load(save(tmp_path, state))) == describe(
        {name: tensor.clone() for name, tensor in state.items()}
    )


def test_empty_tensors_do_not_become_one(tmp_path):
    loaded = load(save(tmp_path, {"a": torch.empty(0), "b": torch.empty(0)}))
    assert loaded["a"] is not loaded["b"]


def test_ordered_dicts_come_back_as_dicts(tmp_path):
    state = {"model": nn.Linear(2, 3).state_dict()}
    assert isinstance(state["model"], collections.OrderedDict)
    loaded = load(save(tmp_path, state))
    assert type(loaded["model"]) is dict
    assert describe(loaded) == describe(state)


def test_files_hold_at_most_the_shard_size_and_never_split_a_tensor(tmp_path):
    state = {"list": [torch.zeros(n, dtype=torch.uint8) for n in (40, 60, 1, 250, 99)]}
    path = save(tmp_path, state, shard_bytes=100)
    files = sorted(path.glob("tensors-*.safetensors"))
    sizes = [[t.numel() for t in load_file(file).values()] for file in files]
    assert [sorted(shard) for shard in sizes] == [[40, 60], [1], [250], [99]]
    assert describe(load(path)) == describe(state)


def test_training_continues_bit_for_bit(tmp_path):
    with torch.random.fork_rng():
        straight = _Run()
        straight_losses = [straight.step() for _ in range(6)]
        straight_end = describe(straight.state())
        interrupted = _Run()
        losses = [interrupted.step() for _ in range(3)]
        path = save(tmp_path, interrupted.state(), step=3)
        resumed = _Run(seed=99)
        resumed.restore(load(path))
        losses += [resumed.step() for _ in range(3)]
        assert losses == straight_losses
        assert describe(resumed.state()) == straight_end


class _Run:
    """A small training run with two parameter groups, a schedule, dropout and a tied weight."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Linear(4, 4))
        self.model[2].weight = self.model[0].weight
        groups = [
            {"params": [self.model[0].weight], "weight_decay": 0.1},
            {"params": [self.model[0].bias, self.model[2].bias], "betas": (0.5, 0.9)},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.05, amsgrad=True)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)

    def step(self):
        loss = self.model(torch.randn(8, 4)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])


class _Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({1, 2}, "builtins.set"),
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (torch.Size([1]), "torch.Size"),
        (_Colour.RED, "_Colour"),
        (b"bytes", "builtins.bytes"),
        (1j, "builtins.complex"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, device="meta"), "device meta"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
        (torch.nn.parameter.UninitializedParameter(), "UninitializedParameter"),
    ],
)
def test_unsupported_values_are_named_by_their_path(tmp_path, value, found):
    state = {"optimizer": {"groups": [{"lr": 0.1}, {"betas": (0.9, value)}]}}
    with pytest.raises(TypeError, match=rf"^state\.optimizer\.groups\.1\.betas\.1 must .*{found}"):
        save(tmp_path / "new", state)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("key", [1.5, None, True, ("a",), _Colour.RED])
def test_unsupported_keys_are_named_by_their_path(tmp_path, key):
    with pytest.raises(TypeError, match=r"every key of state\.model must be str or int, got"):
        save(tmp_path / "new", {"model": {key: 1}})
    with pytest.raises(TypeError, match=r"every key of state must be str or int, got"):
        save(tmp_path / "new", {key: 1})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("state", [{"a": ["\ud800"]}, {"a": [{"\udfff": 1}]}])
def test_invalid_text_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match=r"^state\.a\.0 must hold valid Unicode text, got '\\ud"):
        save(tmp_path / "new", state)
    assert not (tmp_path / "new").exists()


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"state must be a dict, got builtins\.list"):
        save(tmp_path, [1])
    with pytest.raises(ValueError, match=r"step must be .* got -1"):
        save(tmp_path, {}, step=-1)
    with pytest.raises(ValueError, match=r"keep must be .* got 0"):
        save(tmp_path, {}, keep=0)
    with pytest.raises(ValueError, match=r"shard_bytes must be .* got 0"):
        save(tmp_path, {}, shard_bytes=0)
    assert names(tmp_path) == []


def test_the_last_keep_checkpoints_stay(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, {"step": step}, step=step, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]
    assert load(tmp_path / "step-00000003") == {"step": 3}
    save(tmp_path, {"step": 5}, step=5, keep=1)
    assert names(tmp_path) == ["step-00000005"]


def test_a_new_checkpoint_stays_even_below_the_others(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, {"step": step}, step=step)
    save(tmp_path, {"step": 15}, step=15, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000030"]


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    save(tmp_path, {"value": 1}, step=7)
    path = save(tmp_path, {"value": 2}, step=7)
    assert names(tmp_path) == ["step-00000007"]
    assert load(path) == {"value": 2}


def test_the_latest_is_the_highest_whole_step(tmp_path):
    assert latest_checkpoint(tmp_path / "absent") is None
    assert latest_checkpoint(tmp_path) is None
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, {}, step=step)
    for name in (".step-900000000.new", ".step-00000001.old", "step-9", "step-999999999x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-999999999").write_text("a file")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"


def test_leftovers_of_dead_saves_are_removed_and_nothing_else(tmp_path):
    leftovers = [".step-00000001.new", ".step-00000002.old", ".step-00000003.replaced.old"]
    kept = [".step-1.new", ".stepping", "notes.txt.new"]
    for name in leftovers + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("partial")
    save(tmp_path, {}, step=4)
    assert names(tmp_path) == sorted([*kept, "step-00000004"])


def test_a_replaced_checkpoint_counts_until_its_successor_is_there(tmp_path):
    old = save(tmp_path, {"value": "old"}, step=5)
    old.rename(tmp_path / "step-00000005.replaced")
    assert load(latest_checkpoint(tmp_path)) == {"value": "old"}
    save(tmp_path, {"value": "new"}, step=5)
    assert names(tmp_path) == ["step-00000005"]
    assert load(latest_checkpoint(tmp_path)) == {"value": "new"}


def test_a_step_can_be_saved_again_after_a_kill_during_its_replacement(tmp_path):
    save(tmp_path, {"value": "oldest"}, step=5).rename(tmp_path / "step-00000005.replaced")
    save(tmp_path / "elsewhere", {"value": "old"}, step=5).rename(tmp_path / "step-00000005")
    (tmp_path / "elsewhere").rmdir()
    assert load(latest_checkpoint(tmp_path)) == {"value": "old"}
    save(tmp_path, {"value": "new"}, step=5)
    assert names(tmp_path) == ["step-00000005"]
    assert load(latest_checkpoint(tmp_path)) == {"value": "new"}


def test_another_configuration_is_refused(tmp_path):
    path = save(tmp_path, {}, fingerprint="abc")
    message = r"another configuration: its fingerprint is abc, this run's is xyz; resume with the"
    with pytest.raises(CheckpointError, match=message):
        load(path, fingerprint="xyz")


def test_an_absent_checkpoint_is_refused_naming_those_present(tmp_path):
    with pytest.raises(CheckpointError, match=r"step-00000009 does not exist; .*present: none"):
        load(tmp_path / "step-00000009")
    save(tmp_path, {}, step=2)
    with pytest.raises(CheckpointError, match=r"does not exist; .*present: step-00000002"):
        read_step(tmp_path / "step-00000009")


FILES = ["tensors-00000.safetensors", "tensors-00001.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def pair(tmp_path):
    """The later of two checkpoints with two shards each."""
    state = {"a": torch.arange(50), "b": torch.ones(50), "c": "text"}
    save(tmp_path, state, step=1, shard_bytes=100)
    return save(tmp_path, state, step=2, shard_bytes=100)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(pair, name):
    (pair / name).unlink()
    message = rf"step-00000002 is damaged: {name} is missing; delete that directory, then resume "
    with pytest.raises(CheckpointError, match=message + r"\(the previous checkpoint is step-0+1\)"):
        load(pair)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_truncated_file_is_named_with_both_sizes(pair, name):
    data = (pair / name).read_bytes()
    (pair / name).write_bytes(data[:-1])
    message = rf"damaged: {name} has {len(data) - 1} bytes, expected {len(data)}; delete"
    with pytest.raises(CheckpointError, match=message):
        load(pair)
    assert load(latest_checkpoint(pair.parent).with_name("step-00000001"))["c"] == "text"


def test_a_truncated_manifest_is_found_at_every_length(pair):
    data = (pair / "manifest.json").read_bytes()
    for length in range(len(data)):
        (pair / "manifest.json").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"damaged: manifest\.json is not JSON"):
            read_step(pair)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_byte_is_found(pair, name):
    data = bytearray((pair / name).read_bytes())
    for position in range(0, len(data), 7):
        data[position] ^= 1
        (pair / name).write_bytes(data)
        found = hashlib.sha256(data).hexdigest()
        with pytest.raises(CheckpointError, match=rf"damaged: {name} has SHA-256 {found}, expect"):
            load(pair)
        data[position] ^= 1
    (pair / name).write_bytes(data)
    assert load(pair)["c"] == "text"


@pytest.mark.parametrize("mask", [1, 32])
def test_a_flipped_byte_of_the_manifest_is_found_or_without_effect(pair, mask):
    expected = describe(load(pair))
    data = bytearray((pair / "manifest.json").read_bytes())
    refused = 0
    for position in range(len(data)):
        data[position] ^= mask
        (pair / "manifest.json").write_bytes(data)
        try:
            assert (read_step(pair), describe(load(pair))) == (2, expected)
        except CheckpointError:
            refused += 1
        data[position] ^= mask
    assert refused > 0.9 * len(data.replace(b"\n", b"").replace(b" ", b""))


def test_damage_without_an_earlier_checkpoint_says_so(tmp_path):
    path = save(tmp_path, {}, step=3)
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"resume \(no earlier exists\)"):
        load(path)


def test_files_of_two_checkpoints_cannot_be_mixed(tmp_path):
    first = save(tmp_path, {"a": torch.zeros(3)}, step=1)
    second = save(tmp_path, {"a": torch.ones(3)}, step=2)
    (first / FILES[0]).replace(second / FILES[0])
    with pytest.raises(CheckpointError, match=r"tensors-00000\.safetensors has SHA-256"):
        load(second)


def test_a_file_that_cannot_be_read_is_reported(pair):
    (pair / "state.json").unlink()
    (pair / "state.json").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be read: .*state\.json.*; check its perm"):
        load(pair)


def write_by_hand(folder, skeleton=None, *, replaced=None, body=None, version=1):
    """A second writer of the format, from its description alone."""
    contents = {
        "tensors-00000.safetensors": safetensors_bytes({"weights": torch.tensor([1.0, 2.0])}),
        "state.json": json.dumps(skeleton).encode(),
        **(replaced or {}),
    }
    if body is None:
        files = {
            name: {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in contents.items()
        }
        body = {"step": 12, "fingerprint": "abc", "files": files}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    document = {"format": "drgr-checkpoint", "version": version, "sha256": digest, "manifest": body}
    path = folder / "step-00000012"
    path.mkdir()
    for name, data in contents.items():
        (path / name).write_bytes(data)
    (path / "manifest.json").write_text(json.dumps(document))
    return path


def test_the_documented_format_can_be_written_by_others(tmp_path):
    pairs = [["w", {"tensor": "weights"}], [1, {"tuple": [{"float": "inf"}, [None]]}]]
    path = write_by_hand(tmp_path, {"dict": pairs})
    state = load(path)
    assert read_step(path) == 12
    assert describe(state) == describe({"w": torch.tensor([1.0, 2.0]), 1: (math.inf, [None])})


@pytest.mark.parametrize(
    "skeleton",
    [
        [1],
        {"dict": [["a", {"tensor": "absent"}]]},
        {"dict": [["a", {"float": "1e5"}]]},
        {"dict": [["a", {"__reduce__": ["os.system", "true"]}]]},
        {"dict": [["a", {"tuple": 3}]]},
        {"dict": [[["unhashable"], 1]]},
        {"dict": [["a", 1, 2]]},
        {"dict": 5},
        {},
    ],
)
def test_a_skeleton_that_means_nothing_is_refused(tmp_path, skeleton):
    path = write_by_hand(tmp_path, skeleton)
    with pytest.raises(CheckpointError, match=r"damaged: state\.json does not hold a state \("):
        load(path)


def test_a_bottomless_skeleton_is_refused(tmp_path):
    path = write_by_hand(tmp_path, replaced={"state.json": b"[" * 100_000 + b"]" * 100_000})
    with pytest.raises(CheckpointError, match=r"damaged: state\.json .*nested too deeply"):
        load(path)


ANY_RECORD = {"size_bytes": 1, "sha256": "00"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "lacks its step, fingerprint or files"),
        ({"step": 1, "fingerprint": "abc"}, "lacks its step, fingerprint or files"),
        ({"step": 1, "fingerprint": "abc", "files": {}}, "lacks its step, fingerprint or files"),
        (
            {"step": 1, "fingerprint": "abc", "files": {"../state.json": ANY_RECORD}},
            r"has a wrong entry for the file '\.\./state\.json'",
        ),
        (
            {"step": 1, "fingerprint": "abc", "files": {"state.json": {"size_bytes": "1"}}},
            r"has a wrong entry for the file 'state\.json'",
        ),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, body, message):
    path = write_by_hand(tmp_path, body=body)
    with pytest.raises(CheckpointError, match=rf"damaged: manifest\.json {message}"):
        load(path)


def test_a_manifest_without_its_parts_is_refused(pair):
    (pair / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json lacks its format, version, sha256"):
        load(pair)


def test_another_format_version_is_refused(tmp_path):
    path = write_by_hand(tmp_path, {"dict": []}, version=2)
    message = (
        r"has format 'drgr-checkpoint' version 2, this release reads .* version 1; resume with"
    )
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    marker = tmp_path / "executed"
    hostile = pickle.dumps(_Touch(marker))
    path = write_by_hand(tmp_path, {"dict": []}, replaced={"tensors-00000.safetensors": hostile})
    with pytest.raises(CheckpointError, match=r"tensors-00000\.safetensors is not a safetensors"):
        load(path)
    assert not marker.exists()


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))
