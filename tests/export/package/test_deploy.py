"""`galerne deploy`: against stand-ins for ssh and rsync that run here what the box would run, and once against a real sshd."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from galerne.errors import BackendError, CheckFailed, InputError
from galerne.export.package import deploy as module
from galerne.export.package.deploy import Deployment
from tests.export.package.fakes import Box

# ssh [options] -- HOST COMMAND: the command runs here, in the box's home.
SSH = """
while [ "$1" != -- ]; do shift; done
echo "$2" >>"$FAKE_HOSTS"
[ "$2" != gone ] || { echo "ssh: connect to host gone port 22: No route to host" >&2; exit 255; }
cd "$HOME" && exec sh -c "$3"
"""
# rsync [options] -- FILE HOST:PLACE: breaks off halfway as often as it is told, and then appends the rest.
RSYNC = """
case "$*" in *"--partial --append-verify"*) ;; *) exit 1 ;; esac
while [ "$1" != -- ]; do shift; done
place=$HOME/${3#*:}
touch "$place"
there=$(stat -c %s "$place")
echo "$there" >>"$FAKE_TRANSFERS"
size=$(stat -c %s "$2")
if [ "$(wc -l <"$FAKE_TRANSFERS")" -le "${FAKE_BREAKS:-0}" ]; then
    tail -c +$((there + 1)) "$2" | head -c $((size / 3)) >>"$place"
    echo "rsync error: error in rsync protocol data stream (code 12)" >&2
    exit 12
fi
tail -c +$((there + 1)) "$2" >>"$place"
"""


@pytest.fixture
def network(box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stand-ins onto PATH; `install.sh` is told of the box by its environment. Returns: the box's home."""
    home = tmp_path / "home"
    home.mkdir()
    commands = tmp_path / "fakes" / "bin"
    for name, body in (("ssh", SSH), ("rsync", RSYNC)):
        (commands / name).write_text(f"#!/bin/sh\n{body}")
        (commands / name).chmod(0o755)
    for name, value in box.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("FAKE_TRANSFERS", str(tmp_path / "transfers"))
    monkeypatch.setenv("FAKE_HOSTS", str(tmp_path / "hosts"))
    monkeypatch.setattr(module, "time", type("Clock", (), {"sleep": staticmethod(lambda seconds: None)}))
    return home


def _options(box: Box) -> tuple[str, ...]:
    return ("--root", str(box.root))


def test_installs(box: Box, packed: Path, network: Path) -> None:
    Deployment(packed, "me@box", options=_options(box)).run()
    assert box.current is not None
    assert list((network / ".cache/galerne").iterdir()) == []


def test_goes_on_where_a_transfer_broke_off(
    box: Box, packed: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_BREAKS", "2")
    Deployment(packed, "box", options=_options(box)).run()
    size = packed.stat().st_size
    assert [int(line) for line in (tmp_path / "transfers").read_text().split()] == [0, size // 3, 2 * (size // 3)]
    assert box.current is not None


def test_gives_up_and_goes_on_in_the_next_run(
    box: Box, packed: Path, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TRIES", 1)
    monkeypatch.setenv("FAKE_BREAKS", "1")
    with pytest.raises(BackendError, match="box: rsync failed with status 12: .*; run it again to go on from there"):
        Deployment(packed, "box", options=_options(box)).run()
    Deployment(packed, "box", options=_options(box)).run()
    assert [int(line) for line in (tmp_path / "transfers").read_text().split()] == [0, packed.stat().st_size // 3]
    assert box.current is not None


def test_a_failing_install_gives_its_line_and_status(
    box: Box, packed: Path, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ENGINE", "wrong")
    with pytest.raises(CheckFailed, match="box: install.sh: the engine does not match its source"):
        Deployment(packed, "box", options=_options(box)).run()
    monkeypatch.setenv("FAKE_MACHINE", "x86_64")
    with pytest.raises(BackendError, match="box: install.sh: processor: expected aarch64, found x86_64"):
        Deployment(packed, "box", options=_options(box)).run()
    with pytest.raises(InputError, match="box: install.sh: unknown option --nonsense"):
        Deployment(packed, "box", options=("--nonsense",)).run()


def test_a_box_that_is_not_there(packed: Path, network: Path) -> None:
    with pytest.raises(BackendError, match="gone: cannot be reached over ssh: ssh: connect to host gone"):
        Deployment(packed, "gone").run()


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=touch x", "--", "a b", "box;id", "$(id)", "me@-x", "me@", "", "a`id`", "a\nb"]
)
def test_hosts_that_are_none(packed: Path, host: str) -> None:
    with pytest.raises(InputError, match="HOST: expected a name"):
        Deployment(packed, host)


def test_a_shell_sees_no_word_of_an_option(box: Box, packed: Path, network: Path) -> None:
    with pytest.raises(InputError, match="unknown option"):
        Deployment(packed, "box", options=("; touch ../../../injected; $(touch ../../../injected)",)).run()
    assert not (network / "injected").exists()


def test_a_file_that_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "box.zip").touch()
    for name in ("box.zip", "missing.tar"):
        with pytest.raises(InputError, match="expected a package"):
            Deployment(tmp_path / name, "box")


def test_dry_run_runs_nothing(packed: Path, network: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "galerne.cli", "deploy", str(packed), "box", "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    commands = json.loads(done.stdout)["commands"]
    assert [command[0] for command in commands] == ["ssh", "rsync", "ssh"]
    assert not (tmp_path / "hosts").exists()


SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.mark.slow
@pytest.mark.skipif(SSHD is None or not shutil.which("rsync"), reason="needs sshd and rsync: openssh-server, rsync")
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="sshd needs root here")
def test_over_a_real_sshd(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a port of the loopback interface: the file arrives whole, and install.sh, which finds no box here, says so."""
    key, host_key = tmp_path / "key", tmp_path / "host_key"
    for file in (key, host_key):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\n"
        f"PidFile none\nPermitRootLogin yes\nUsePAM no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    # ssh reads its user's configuration from the home that the system says, so the options come before it on PATH.
    wrapper = tmp_path / "bin" / "ssh"
    wrapper.parent.mkdir()
    options = (
        f"-i {key} -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    )
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert SSHD is not None
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        deployment = Deployment(packed, f"{getpass.getuser()}@127.0.0.1", port, ("--check",))
        with pytest.raises(BackendError, match="install.sh: processor: expected aarch64, found "):
            deployment.run()
        name = deployment.commands()[1][-1].partition(":")[2]
        arrived = Path.home() / name
        assert arrived.read_bytes() == packed.read_bytes()
        arrived.unlink()
        shutil.rmtree(arrived.with_suffix(""))
    finally:
        server.terminate()
        server.wait()
