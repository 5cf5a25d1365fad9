"""Progress lines where stderr is no terminal."""

import pytest

from galerne import progress


def test_lines_say_how_much_is_done_and_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress.Task("work", 4) as task:
        for clock[0] in (1.0, 30.0, 1000.0, 1300.0):
            task.advance()
    assert capsys.readouterr().err.splitlines() == ["work: 50%, 30 s left", "work: 75%, 6 min left", "work: 100%"]
