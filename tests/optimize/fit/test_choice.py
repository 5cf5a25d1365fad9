"""Which recipe, how long a context, how many rows: what is said fits, and one more does not."""

from collections.abc import Callable

import pytest

from galerne.errors import InputError
from galerne.optimize.fit.choice import Case, assess
from galerne.optimize.quantize.recipe import load

CaseOf = Callable[..., Case]


@pytest.mark.parametrize(
    ("target", "best"),
    [
        ("h100-sxm", "fp16"),
        ("l4", "fp16"),
        ("jetson-orin-nx-16gb", "int8"),
        ("jetson-orin-nano-8gb", "int4"),
        ("jetson-orin-nano-4gb", None),
    ],
)
def test_the_widest_recipe_that_fits(case_of: CaseOf, target: str, best: str | None) -> None:
    found = assess(case_of("mistral-7b-v0.1", target))
    assert (found.best or "none").startswith(best or "none")
    assert found.chosen.fits == (best is not None) and found.chosen == found.recipes[found.recipe]
    sizes = [each.memory_bytes["weights"] for each in found.recipes.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert list(found.recipes)[:3] == ["fp32", "fp16", "bf16"] and {"int8", "int4-rtn"} <= set(found.recipes)


def test_a_type_that_the_stack_lacks_does_not_fit(case_of: CaseOf) -> None:
    found = assess(case_of("mistral-7b-v0.1", "t4"), load("int4-rtn"), "int4-rtn")
    assert found.chosen.missing_types == ("int4",) and not found.chosen.fits
    assert "t4: tensorrt-rtx-1.7 does not take int4; " in found.refusal()
    assert found.best == "fp16" and "bf16" not in (found.best, found.recipe)


@pytest.mark.parametrize("target", ["l4", "t4", "jetson-orin-nx-16gb"])
@pytest.mark.parametrize("name", ["int8", "int4-rtn"])
def test_longest_context_and_most_rows_are_the_edge(case_of: CaseOf, target: str, name: str) -> None:
    case, recipe = case_of("llama-3.1-8b", target, 2048), load(name)
    found = assess(case, recipe, name)
    if not found.chosen.fits:
        assert found.max_batch == 0
        return
    longest, rows = found.max_context, found.max_batch
    assert longest is not None and longest >= 2048 and rows >= 1
    assert case.fit(recipe, context=longest).fits and case.fit(recipe, batch=rows).fits
    assert longest == case.max_context or not case.fit(recipe, context=longest + 1).fits
    assert not case.fit(recipe, batch=rows + 1).fits


def test_a_window_has_no_longest_context(case_of: CaseOf) -> None:
    found = assess(case_of("mistral-7b-v0.1", "l4"))
    assert found.max_context is None
    # Where not even the whole ring fits, a shorter context may.
    short = assess(case_of("mistral-7b-v0.1", "l4", budget_bytes=14_700_000_000), load("fp16"), "fp16")
    assert short.max_context is not None and 0 < short.max_context < 4096
    assert f"with --context {short.max_context} it fits" in short.refusal() or "the recipe int8 fits" in short.refusal()


def test_a_budget_is_kept(case_of: CaseOf) -> None:
    found = assess(case_of("mistral-7b-v0.1", "l4", budget_bytes=6 * 10**9))
    assert found.best is not None and found.best.startswith("int4") and found.chosen.limit_bytes == 6 * 10**9
    refused = assess(case_of("mistral-7b-v0.1", "l4", budget_bytes=6 * 10**9), load("fp16"), "fp16")
    assert "more than the budget of 6.00 GB; at batch 1 and context 4096 the recipe int4" in refused.refusal()


def test_a_budget_beyond_the_device_does_not_help(case_of: CaseOf) -> None:
    found = assess(case_of("mistral-7b-v0.1", "jetson-orin-nano-4gb", budget_bytes=10**12))
    assert not found.chosen.fits and found.chosen.limit_bytes == found.chosen.usable_bytes


def test_power_modes_have_their_own_bound(case_of: CaseOf) -> None:
    modes = assess(case_of("mistral-7b-v0.1", "jetson-orin-nano-8gb")).power_modes
    assert modes["MAXN_SUPER"] == modes["25W"] > modes["15W"] > 0


def test_a_context_beyond_the_longest_is_refused(case_of: CaseOf) -> None:
    with pytest.raises(InputError, match="--context 40000: the longest context of mistral-7b-v0.3 is 32768"):
        assess(case_of("mistral-7b-v0.3", "l4", 40000))


def test_rings_of_a_bundle_have_their_size_whatever_is_asked(case_of: CaseOf) -> None:
    loose, fixed = (case_of("mistral-7b-v0.3", "l4", 1024, fixed_rings=fixed) for fixed in (False, True))
    caches = [assess(case).chosen.memory_bytes["cache"] for case in (loose, fixed)]
    assert caches[1] == 32 * caches[0]
