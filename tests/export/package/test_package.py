"""What a package holds, that it is the same each time, and what is refused."""

import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from galerne.errors import BackendError, CheckFailed, InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.package import package as module
from galerne.export.package.package import package
from galerne.export.package.wheels import gather, lock_of, own_wheel, read_lock
from galerne.runtime.bundle import Bundle
from galerne.runtime.manifest import Verdict
from galerne.targets.target import Stack, Target, load

Pack = Callable[..., module.Package]


@pytest.fixture
def pack(
    primitive: Bundle,
    checkpoint_folder: Path,
    orin: Target,
    jetpack6: Stack,
    one_wheel: tuple[str, Path],
    tmp_path: Path,
) -> Pack:
    """Pack the shared bundle, or another one, into a file of a name."""

    def run(name: str = "box.tar", **changes: object) -> module.Package:
        lock, wheels = one_wheel
        given = {"bundle": primitive, "target": orin, "stack": jetpack6, "lock": lock, "wheels": wheels, **changes}
        return package(checkpoint=open_checkpoint(checkpoint_folder), out=tmp_path / name, **given)  # type: ignore[arg-type]

    return run


def test_the_same_inputs_give_the_same_bytes(pack: Pack) -> None:
    first, second = pack("one.tar"), pack("two.tar")
    assert first.path.read_bytes() == second.path.read_bytes()


def test_compressed(pack: Pack) -> None:
    zstandard = pytest.importorskip("zstandard", reason="zstandard, which compresses the package, is not installed")
    first, second, plain = pack("one.tar.zst"), pack("two.tar.zst"), pack("one.tar")
    assert first.path.read_bytes() == second.path.read_bytes()
    with first.path.open("rb") as file:
        assert zstandard.ZstdDecompressor().stream_reader(file).read() == plain.path.read_bytes()


def test_what_it_holds(unpacked: Path, primitive: Bundle) -> None:
    lines = (line.split("  ") for line in (unpacked / "SHA256SUMS").read_text().splitlines())
    sums = {name: digest for digest, name in lines}
    there = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert there == {*sums, "SHA256SUMS"}
    for name, expected in sums.items():
        assert hashlib.sha256((unpacked / name).read_bytes()).hexdigest() == expected
    bundle = Bundle.open(unpacked / "bundle")
    bundle.verify_hashes()
    assert bundle.fingerprint() == primitive.fingerprint()
    assert json.loads((unpacked / "plan/build.json").read_text())["stack"] == "jetpack-6.2"
    conf = dict(line.split("=", 1) for line in (unpacked / "box.conf").read_text().splitlines())
    assert conf["jetpack"] == "6.2" and conf["tensorrt"] == "10.3" and conf["parity"] == "passed"
    assert 0 < int(conf["run_memory_bytes"]) < int(conf["build_memory_bytes"]) < 16e9
    assert (unpacked / "install.sh").stat().st_mode & 0o111


def test_the_wheel_runs_away_from_the_tree(tmp_path: Path) -> None:
    name, content = own_wheel()
    assert own_wheel()[1] == content and name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        wheel.extractall(tmp_path / "site")
    program = (
        "import sys; sys.path.insert(0, 'site'); import galerne.cli.main as m, galerne.targets.target as t\n"
        "print(m.__file__, len(t.load_all()))\nfrom galerne.export.package.package import _box_members\n_box_members('x')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("site") or str(tmp_path) in done.stdout


def test_engines_of_other_machines_stay_behind(pack: Pack, primitive: Bundle) -> None:
    files = {**primitive.manifest.files, "engines/cpu/engine.json": primitive.manifest.files["model.onnx"]}
    names = module._bundle_members(Bundle(primitive.path, dataclasses.replace(primitive.manifest, files=files)))
    assert "bundle/engines/cpu/engine.json" not in names and "bundle/model.onnx" in names


@pytest.mark.parametrize(
    ("verdict", "says"), [(None, "has no parity verdict"), (False, "failed its parity check")], ids=["none", "failed"]
)
def test_without_a_passing_verdict(pack: Pack, primitive: Bundle, verdict: bool | None, says: str) -> None:
    name = "reports/parity-portable.json"
    parity = (
        {}
        if verdict is None
        else {"portable": dataclasses.replace(primitive.manifest.parity["portable"], passed=verdict)}
    )
    other = Bundle(primitive.path, dataclasses.replace(primitive.manifest, parity=parity))
    assert name in other.manifest.files
    with pytest.raises(CheckFailed, match=says):
        pack(bundle=other)
    made = pack(bundle=other, force=True)
    with tarfile.open(made.path) as archive:
        conf = archive.extractfile("tiny-jetson-orin-nx-16gb/box.conf")
        assert conf is not None
        assert f"parity={'none' if verdict is None else 'failed'}\n" in conf.read().decode()


def test_a_target_that_needs_none(pack: Pack) -> None:
    with pytest.raises(
        InputError, match=r"--target l4: needs no package; build its engine where TensorRT is: `galerne build"
    ):
        pack(target=load("l4"), stack=load("l4").stacks[0])


def test_the_wrong_dialect(pack: Pack, bundle_of: Callable[[str], Bundle]) -> None:
    other = bundle_of("fp16")
    verdict = dataclasses.replace(other.manifest, parity={"portable": Verdict(True, "none")})
    with pytest.raises(InputError, match="export with --dialect primitive"):
        pack(bundle=Bundle(other.path, verdict))


def test_a_model_that_does_not_fit(pack: Pack, orin: Target) -> None:
    small = dataclasses.replace(orin, memory_bytes=2_500_000_000)
    with pytest.raises(CheckFailed, match="while its engine is built, it has 0.1"):
        pack(target=small)


@pytest.mark.parametrize("name", ["box.zip", "box"])
def test_a_name_that_is_no_archive(pack: Pack, name: str) -> None:
    with pytest.raises(InputError, match=r"expected a name that ends in \.tar\.zst or \.tar"):
        pack(name)


@pytest.mark.parametrize("given", ["../x", "-x", "a b", "A", "x" * 41])
def test_a_bundle_name_for_no_path(primitive: Bundle, given: str) -> None:
    with pytest.raises(InputError, match="--name: expected up to 40 small letters"):
        module._name(given, primitive)
    assert module._name(None, primitive) == "tiny"


@pytest.mark.parametrize("target", ["jetson-orin-nx-16gb", "jetson-thor-t5000"])
def test_each_stack_has_a_list_of_wheels(target: str) -> None:
    for stack in load(target).stacks:
        pins = {pin.name: pin.version for pin in read_lock(lock_of(stack))}
        assert {"numpy", "onnxruntime", "tokenizers", "jinja2", "typer", "rich", "cuda-bindings"} <= set(pins)
        assert ("tomli" in pins) == (stack.python == "3.10")
        assert pins["cuda-bindings"].split(".")[0] == (stack.cuda or "").split(".")[0]


def test_a_stack_without_a_list(jetpack6: Stack) -> None:
    with pytest.raises(InputError, match=r"Python 3\.9 with CUDA 12\.6 has no list of wheels"):
        lock_of(dataclasses.replace(jetpack6, python="3.9"))


def test_a_list_that_does_not_pin() -> None:
    with pytest.raises(InputError, match="expected NAME==VERSION"):
        read_lock("numpy>=2\n")


def test_wheels_that_are_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(BackendError, match=r"lacks nothing 1\.0, and pip does not get them: ERROR"):
        gather(f"nothing==1.0 --hash=sha256:{'0' * 64}\n", "3.10", tmp_path)
    assert list(tmp_path.iterdir()) == []
