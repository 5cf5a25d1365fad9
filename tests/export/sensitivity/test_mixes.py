"""Mixes against all that there are."""

import itertools
import random

from galerne.export.sensitivity.mixes import Mix, Option, filled, mixes, narrowed
from galerne.optimize.quantize.recipe import WeightFormat

FORMS = [WeightFormat("float16"), WeightFormat("int8"), WeightFormat("int4", 32), WeightFormat("int4", 128)]


def test_no_mix_of_as_few_bytes_harms_less() -> None:
    rng = random.Random(0)
    for _ in range(20):
        groups = [
            [
                Option(form, int(share * size), harm)
                for form, share, harm in zip(
                    FORMS, (16, 8, 4.5, 4.1), sorted(rng.random() ** 4 for _ in FORMS), strict=True
                )
            ]
            for size in (rng.randint(100, 1000) for _ in range(4))
        ]
        every = [Mix(options) for options in itertools.product(*groups)]
        found = mixes(groups)
        assert found[0].options == tuple(group[0] for group in groups)
        assert found[-1].options == tuple(group[-1] for group in groups)
        for mix in found:
            assert not any(other.bytes <= mix.bytes and other.harm < mix.harm - 1e-12 for other in every)


def test_an_option_that_is_larger_and_harms_more_is_never_taken() -> None:
    """As of a vocabulary projection that is the embedding's table: wide, it takes nothing."""
    head = [Option(FORMS[0], 0, 0.0), Option(FORMS[1], 800, 0.1), Option(FORMS[3], 400, 0.2)]
    layer = [Option(FORMS[0], 1600, 0.0), Option(FORMS[3], 400, 0.0)]
    assert [mix.options for mix in mixes([head, layer])] == [(head[0], layer[1])]


def test_one_step_at_a_time_in_the_order_of_harm_for_each_byte() -> None:
    cheap = [Option(FORMS[0], 100, 0.0), Option(FORMS[1], 50, 0.1)]
    dear = [Option(FORMS[0], 100, 0.0), Option(FORMS[1], 50, 1.0)]
    assert [(mix.bytes, mix.harm) for mix in mixes([dear, cheap])] == [(200, 0.0), (150, 0.1), (100, 1.1)]


def test_what_a_step_leaves_is_spent() -> None:
    large = [Option(FORMS[0], 1000, 0.0), Option(FORMS[1], 500, 1.0)]
    small = [Option(FORMS[0], 100, 0.0), Option(FORMS[1], 50, 0.5)]
    found = mixes([large, small])
    first = next(mix for mix in found if mix.bytes <= 620)
    assert first.bytes == 600 and filled(first, found, 620) == first  # the large one stepped down alone
    narrow = Mix((large[1], small[1]))
    assert filled(narrow, found, 620).options == (large[1], small[0])
    assert filled(narrow, found, 599) == narrow


def test_past_a_step_that_is_too_large_others_follow() -> None:
    large = [Option(FORMS[0], 1000, 0.0), Option(FORMS[1], 100, 1.0)]
    small = [[Option(FORMS[0], 100, 0.0), Option(FORMS[1], 50, 0.1)] for _ in range(2)]
    found = mixes([large, *small])
    assert found[1].options[0] == large[1]
    assert narrowed(found[0], found, 0.15).options == (large[0], small[0][1], small[1][0])
    assert narrowed(found[0], found, 0.05) == found[0]
