"""The exit status of each error is a promise to scripts: a change here breaks them."""

import pytest

from galerne import errors
from galerne.errors import BackendError, BusyError, Cancelled, CheckFailed, GalerneError, InputError

STATUS = [
    (CheckFailed, 1),
    (InputError, 2),
    (BackendError, 3),
    (BusyError, 4),
    (Cancelled, 130),
    (GalerneError, 70),
]


@pytest.mark.parametrize(("kind", "status"), STATUS, ids=lambda v: str(v))
def test_exit_code(kind: type[GalerneError], status: int) -> None:
    assert kind("why").exit_code == status


def test_each_kind_has_its_own_status_and_one_base() -> None:
    defined = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = [kind for kind in defined if issubclass(kind, GalerneError)]
    assert kinds == defined
    assert len({kind.exit_code for kind in kinds}) == len(kinds)


def test_message_is_kept_as_it_is() -> None:
    assert str(InputError("config.json: rope_theta is missing")) == "config.json: rope_theta is missing"
