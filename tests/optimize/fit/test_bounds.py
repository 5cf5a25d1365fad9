"""Bounds: never below what anybody published, and following bandwidth, arithmetic, context and batch."""

import dataclasses

import pytest

from benchmarks.published import Figure, figures
from galerne.optimize.fit.bounds import decode_bound, prefill_bound
from galerne.optimize.fit.device import Device
from galerne.optimize.fit.workload import Workload, attention_ops
from galerne.optimize.quantize.recipe import load
from galerne.runtime.footprint import forms_of
from galerne.runtime.manifest import ModelFacts
from galerne.targets import target as targets

FORMS = forms_of(load("fp16").resolved())
SLOW_MEMORY = Device("x", "x", 1, 1, 1e11, {"float16": 1e18}, measured=False)
SLOW_ARITHMETIC = Device("x", "x", 1, 1, 1e18, {"float16": 1e12}, measured=False)


@pytest.mark.parametrize("figure", figures(), ids=lambda figure: f"{figure.target}, {figure.model}, {figure.tool}")
def test_no_published_figure_is_above_the_bound(figure: Figure) -> None:
    assert figure.source.startswith("http") or "https://" in figure.source
    assert 0.1 * figure.bound() < figure.tokens_per_s <= figure.bound()


def test_published_figures_are_of_many_devices() -> None:
    jetsons = {figure.target for figure in figures() if targets.load(figure.target).kind == "jetson"}
    assert len(jetsons) >= 4 and len({figure.target for figure in figures()} - jetsons) >= 3


def test_decode_is_bound_by_bytes(mistral: ModelFacts) -> None:
    work = Workload(mistral, FORMS, 4096, 1, 256, 4096)
    weights = 2 * (32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096) + 32000 * 4096)
    cache = 32 * 4096 * 2 * 8 * 128 * 2
    assert decode_bound(work, SLOW_MEMORY) == pytest.approx(1e11 / (weights + cache))
    assert decode_bound(work, SLOW_MEMORY, 5e10) == pytest.approx(5e10 / (weights + cache))
    more = dataclasses.replace(work, batch=8)
    assert decode_bound(more, SLOW_MEMORY) == pytest.approx(8e11 / (weights + 8 * cache))


def test_decode_is_bound_by_arithmetic(mistral: ModelFacts) -> None:
    work = Workload(mistral, FORMS, 1, 1, 256, 1)
    products = 32 * (4096 * 6144 + 4096 * 4096 + 4096 * 28672 + 14336 * 4096) + 32000 * 4096
    scores = 32 * 4 * 32 * 128
    assert decode_bound(work, SLOW_ARITHMETIC) == pytest.approx(1e12 / (2 * products + scores))
    assert decode_bound(dataclasses.replace(work, batch=8), SLOW_ARITHMETIC) == pytest.approx(
        1e12 / (2 * products + scores)
    )


def test_prefill_reads_the_weights_once_a_chunk(mistral: ModelFacts) -> None:
    one, two = (prefill_bound(Workload(mistral, FORMS, size, 1, 256, size), SLOW_MEMORY) for size in (256, 257))
    assert two == pytest.approx(one * 257 / 512)


def test_attention_is_counted_position_by_position(mistral: ModelFacts) -> None:
    for context in (1, 4095, 4096, 4097, 6000):
        keys = sum(min(position + 1, 4096) for position in range(context))
        assert attention_ops(mistral, context) == 32 * keys * 4 * 32 * 128


def test_a_window_bounds_decode_past_it(mistral: ModelFacts) -> None:
    rates = [decode_bound(Workload(mistral, FORMS, size, 1, 256, size), SLOW_MEMORY) for size in (2048, 4096, 100_000)]
    assert rates[0] > rates[1] == pytest.approx(rates[2])


def test_without_a_figure_for_a_type_the_bandwidth_bounds(mistral: ModelFacts) -> None:
    work = Workload(mistral, FORMS, 4096, 1, 256, 4096)
    unknown = dataclasses.replace(SLOW_MEMORY, ops_per_s={})
    assert prefill_bound(work, unknown) == prefill_bound(work, SLOW_MEMORY)
