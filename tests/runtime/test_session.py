"""Sessions through a real bundle: taking back, forking, saving, and what a damaged file says."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from galerne.errors import InputError
from galerne.optimize.builders.build import build
from galerne.runtime.bundle import Bundle
from galerne.runtime.model import Model
from galerne.runtime.session import Session
from galerne.targets.target import load

Bundles = Callable[[str], Bundle]
CHUNK, WINDOW = 8, 16  # of the bundles in conftest.py


@pytest.fixture(scope="module")
def model(bundle_of: Bundles) -> Model:
    return Model.open(bundle_of("fp32").path)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 501, count)]


def greedy(session: Session, count: int) -> list[int]:
    ids = []
    for _ in range(count):
        ids.append(int(session.logits.argmax()))
        session.append(ids[-1:])
    return ids


def fed(model: Model, ids: list[int]) -> Session:
    session = model.session()
    session.append(ids)
    return session


def test_a_session_gives_what_rows_give(model: Model) -> None:
    session = fed(model, tokens(50))
    assert session.length == 50
    assert np.array_equal(session.logits, model.rows().feed([tokens(50)])[0])
    session.append([])
    assert session.length == 50


def test_logits_are_asked_for_too_early(model: Model) -> None:
    session = model.session()
    with pytest.raises(InputError, match="logits: none yet; append a token"):
        _ = session.logits
    session.append([1, 2])
    session.rewind(0)
    assert session.logits.shape == (501,)
    session.rewind(1)
    with pytest.raises(InputError, match="logits: none yet"):
        _ = session.logits


@pytest.mark.parametrize("length", [10, 200])
def test_rewind_and_go_another_way(model: Model, length: int) -> None:
    session = fed(model, tokens(length))
    expected = greedy(fed(model, [*tokens(length), 7]), 20)
    session.append(tokens(5, seed=9))
    session.rewind(5)
    session.append([7])
    assert greedy(session, 20) == expected


def test_a_fork_goes_its_own_way(model: Model) -> None:
    for length in (10, 200):
        session = fed(model, tokens(length))
        twin = session.fork()
        expected = greedy(session.fork(), 30)
        twin.append(tokens(30, seed=1))
        assert greedy(session, 30) == expected
        assert twin.length == session.length == length + 30
        assert not np.array_equal(twin.logits, session.logits)


@pytest.mark.parametrize("length", [0, 10, 200])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_saved_session_goes_on(bundle_of: Bundles, tmp_path: Path, precision: str, length: int) -> None:
    model, file = Model.open(bundle_of(precision).path), tmp_path / "session"
    session = fed(model, tokens(length))
    session.save(file)
    session.save(file)  # over an older one
    with Model.open(bundle_of(precision).path) as other:
        again = other.load_session(file)
        assert (again.length, again.rewindable) == (session.length, session.rewindable)
        if length:
            assert np.array_equal(again.logits, session.logits)
        for each in (session, again):
            each.append([3])
        assert greedy(again, 30) == greedy(session, 30)
    assert [entry.name for entry in tmp_path.iterdir()] == ["session"]


def test_a_session_moves_between_engines_that_keep_the_same_type(bundle_of: Bundles, tmp_path: Path) -> None:
    """The `cpu` engine keeps values transposed."""
    shutil.copytree(bundle_of("fp32").path, tmp_path / "bundle")
    built = build(Bundle.open(tmp_path / "bundle"), load("cpu"))
    portable, engine = Model.open(built.path, "portable"), Model.open(built.path, "cpu")
    for one, other in ((portable, engine), (engine, portable)):
        session = fed(one, tokens(200))
        session.save(tmp_path / "session")
        again = other.load_session(tmp_path / "session")
        assert all(np.array_equal(a, b) for a, b in zip(again.cache, session.cache, strict=True))
        assert greedy(again, 20) == greedy(session.fork(), 20) == greedy(session, 20)
    half = Model.open(bundle_of("fp16").path)
    wide = build(Bundle.open(shutil.copytree(half.bundle.path, tmp_path / "fp16")), load("cpu"))
    fed(half, [1]).save(tmp_path / "session")
    with pytest.raises(InputError, match="holds F16 keys, engine 'cpu' keeps F32; it was saved with engine 'portable'"):
        Model.open(wide.path, "cpu").load_session(tmp_path / "session")


def test_a_rewound_session_is_saved_as_it_is(model: Model, tmp_path: Path) -> None:
    session = fed(model, tokens(100))
    session.rewind(3)
    session.save(tmp_path / "session")
    again = model.load_session(tmp_path / "session")
    assert again.rewindable == session.rewindable < CHUNK + 1
    with pytest.raises(InputError, match="logits: none yet"):
        _ = again.logits


def test_other_tools_read_a_saved_session(model: Model, tmp_path: Path) -> None:
    session = fed(model, tokens(20))
    session.save(tmp_path / "session.safetensors")
    tensors = load_file(tmp_path / "session.safetensors")
    assert np.array_equal(tensors["logits"], session.logits)
    assert np.array_equal(tensors["past_key_values.1.value"], session.cache[3])


def _rewrite(file: Path, change: Callable[[dict], None]) -> None:  # type: ignore[type-arg]
    """Change the record in a file's header, as someone with an editor would."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    record = json.loads(header["__metadata__"]["galerne_session"])
    change(record)
    header["__metadata__"]["galerne_session"] = json.dumps(record)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 199}, "its SHA-256 is not the one"),
        ({"written": 201}, "its SHA-256 is not the one"),
        ({"position": -1}, "cannot be in a ring"),
        ({"position": 300}, "cannot be in a ring"),
        ({"capacities": [23]}, "200 tokens in 23 slots cannot be in a ring of 24"),
        ({"capacities": [24, 24]}, "cannot be in a ring of 24"),
        ({"has_logits": False}, "its tensors are not those of a session of 200 tokens"),
        ({"bundle": "0" * 64}, "saved with another model (000000000000…)"),
        ({"schema_version": 2}, "schema_version: expected 1, found 2; feed the text again"),
        ({"position": "x"}, "position"),
        ({"extra": 1}, "unknown key 'extra'"),
    ],
)
def test_a_changed_record_is_refused(model: Model, tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "session"
    fed(model, tokens(200)).save(file)
    _rewrite(file, lambda record: record.update(change))
    with pytest.raises(InputError) as caught:
        model.load_session(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_flipped_or_missing_byte_is_noticed(model: Model, tmp_path: Path) -> None:
    good, file = tmp_path / "good", tmp_path / "bad"
    fed(model, tokens(40)).save(good)
    data = good.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    random = np.random.default_rng(0)
    places = [*range(8), *random.integers(8, 8 + length, 150), *random.integers(8 + length, len(data), 50)]
    for place in places:
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x11]) + data[place + 1 :])
        with pytest.raises(InputError):
            model.load_session(file)
    for size in (0, 5, 8, 100, 8 + length, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(InputError):
            model.load_session(file)


def test_files_that_are_no_session(model: Model, bundle_of: Bundles, tmp_path: Path, checkpoint_folder: Path) -> None:
    for file, message in (
        (tmp_path / "none", "cannot read a session there (No such file"),
        (tmp_path, "cannot read a session there (Is a directory"),
        (checkpoint_folder / "model.safetensors", "no galerne_session in its metadata"),
        (checkpoint_folder / "config.json", "not a session"),
    ):
        with pytest.raises(InputError) as caught:
            model.load_session(file)
        assert str(caught.value).startswith(f"{file}: ")
        assert message in str(caught.value)
    with pytest.raises(InputError, match="cannot write the session there"):
        model.session().save(tmp_path / "no" / "folder")
    session = fed(Model.open(bundle_of("fp16").path), [1])
    session.save(tmp_path / "half")
    with pytest.raises(InputError, match="saved with another model"):
        model.load_session(tmp_path / "half")


def test_closed_is_said_in_one_line(bundle_of: Bundles) -> None:
    model = Model.open(bundle_of("fp32").path)
    kept, session = fed(model, [1]), fed(model, [1])
    logits = session.logits
    before = logits.copy()
    session.close()
    session.close()
    uses: list[Callable[[], object]] = [lambda: session.append([1]), session.fork, lambda: session.cache]
    for use in uses:
        with pytest.raises(InputError, match="the sequence is closed"):
            use()
    kept.append([2])
    with model:
        pass
    model.close()
    uses = [lambda: kept.append([1]), lambda: kept.cache, lambda: model.session(), lambda: model.rows()]
    for use in uses:
        with pytest.raises(InputError, match="the model is closed; open it again"):
            use()
    assert np.array_equal(logits, before)
