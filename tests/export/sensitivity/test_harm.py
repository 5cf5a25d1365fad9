"""Harms that are measured for all weights at once, against what rounding one weight alone does to the answers."""

import fnmatch
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.facts import read_facts
from galerne.export.parity import streamed as streamed_module
from galerne.export.parity.streamed import StreamedModel
from galerne.export.sensitivity import harm as harm_module
from galerne.export.sensitivity.groups import Group, groups_of
from galerne.export.sensitivity.harm import Harms, measure_harms
from galerne.optimize.quantize.recipe import Override, Recipe, WeightFormat
from galerne.runtime.bundle import TOKENIZER
from galerne.runtime.tokenizer import Tokenizer

TINY = Path(__file__).parents[3] / "examples" / "tiny-mistral"
FORMATS = [WeightFormat("int8"), WeightFormat("int4", 32), WeightFormat("int4", 128)]
WIDE = WeightFormat("float32")
NEAREST = Recipe("", "float16", FORMATS[0], FORMATS[0])
Ids = np.ndarray


@pytest.fixture(scope="module")
def text_ids() -> Ids:
    """8 sequences of 192 tokens, which is past the window of 128."""
    tokenizer = Tokenizer.parse(open_checkpoint(TINY).tokenizer_files()[TOKENIZER], None, "", "")
    ids = np.array(tokenizer.encode((TINY / "held-out.txt").read_text(encoding="utf-8")), np.int64)
    return ids[: 8 * 192].reshape(8, 192)


@pytest.fixture(scope="module")
def tiny() -> StreamedModel:
    return StreamedModel(open_checkpoint(TINY))


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return groups_of(read_facts(str(TINY))[0])


@pytest.fixture(scope="module")
def harms(tiny: StreamedModel, groups: list[Group], text_ids: Ids) -> Harms:
    return measure_harms(tiny, NEAREST, groups, FORMATS, text_ids)


def divergence(streamed: StreamedModel, ids: Ids) -> Callable[..., float]:
    """Return a function that gives the mean KL(source, rounded) with some weights rounded and all others as they are."""
    streamed.rounding = None
    with torch.no_grad():
        source = torch.log_softmax(streamed.model(torch.from_numpy(ids)).logits, -1)

    def measure(*overrides: tuple[str, WeightFormat]) -> float:
        streamed.rounding = Recipe("", "float32", WIDE, WIDE, overrides=tuple(Override(*each) for each in overrides))
        with torch.no_grad():
            rounded = torch.log_softmax(streamed.model(torch.from_numpy(ids)).logits, -1)
        streamed.rounding = None
        return float((source.exp() * (source - rounded)).sum(-1).mean())

    return measure


def test_every_weight_is_in_a_group_and_fewer_bits_are_more_harm(
    harms: Harms, groups: list[Group], tiny: StreamedModel
) -> None:
    linear = [f"{path}.weight" for path, module in tiny.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for group in groups:
        assert set(fnmatch.filter(linear, group.match)) == set(group.names)
        by_format = harms[group.match]
        assert 0 < by_format[FORMATS[0]] < by_format[FORMATS[1]] < by_format[FORMATS[2]], group
    assert sorted(linear) == sorted(name for group in groups for name in group.names)


def test_a_harm_is_what_that_rounding_alone_does(harms: Harms, tiny: StreamedModel, text_ids: Ids) -> None:
    """Queries, keys and values most of all, whose positions attention mixes. What is left is the noise of drawn tokens."""
    measure = divergence(tiny, text_ids)
    form = FORMATS[2]
    ratios = {match: by_format[form] / measure((match, form)) for match, by_format in harms.items()}
    assert all(0.75 < ratio < 1.33 for ratio in ratios.values()), sorted(ratios.items(), key=lambda item: item[1])
    assert 0.93 < float(np.median(list(ratios.values()))) < 1.07


def test_harms_add_up(harms: Harms, tiny: StreamedModel, text_ids: Ids) -> None:
    measure = divergence(tiny, text_ids)
    everything = measure(("*", FORMATS[2]))
    assert math.isclose(sum(each[FORMATS[2]] for each in harms.values()), everything, rel_tol=0.15)


def test_the_same_in_several_passes_and_with_weights_that_are_not_kept(
    text_ids: Ids, groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a model that is larger than memory: weights are read, used and dropped, layer by layer."""

    def measured() -> Harms:
        return measure_harms(StreamedModel(open_checkpoint(TINY)), NEAREST, groups, FORMATS[:1], text_ids[:4])

    kept = measured()
    monkeypatch.setattr(streamed_module, "_KEEP_BYTES", 0)
    assert measured() == kept
    monkeypatch.setattr(harm_module, "_MOST_LOGITS", 1)
    for match, by_format in measured().items():
        assert math.isclose(by_format[FORMATS[0]], kept[match][FORMATS[0]], rel_tol=1e-2), match


def test_experts_are_one_group(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, num_experts_per_tok=2, vocab_size=203, sliding_window=16, initializer_range=0.1,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    streamed = StreamedModel(open_checkpoint(tmp_path / "mixtral"))
    groups = groups_of(read_facts(str(tmp_path / "mixtral"))[0])
    ids = np.random.default_rng(0).integers(0, 203, (16, 64))
    found = measure_harms(streamed, NEAREST, groups, FORMATS[1:2], ids)
    measure = divergence(streamed, ids)
    experts = [group for group in groups if ".experts." in group.match]
    assert [group.match for group in experts[:2]] == [
        "model.layers.0.block_sparse_moe.experts.*.w[13].weight",
        "model.layers.0.block_sparse_moe.experts.*.w2.weight",
    ]
    assert len(experts[0].names) == 6 and len(experts[1].names) == 3
    # Of the last layer: an earlier one's change makes later routers choose other experts, a jump that no gradient has.
    for group in experts[2:]:
        assert 0.7 < found[group.match][FORMATS[1]] / measure((group.match, FORMATS[1])) < 1.4, group.match


def test_a_block_that_divides_nothing_is_left_out(saved_mistral: Callable[..., Path]) -> None:
    folder = saved_mistral(intermediate_size=100)
    streamed = StreamedModel(open_checkpoint(folder))
    groups = groups_of(read_facts(str(folder))[0])
    found = measure_harms(streamed, NEAREST, groups, FORMATS, np.random.default_rng(0).integers(0, 501, (2, 40)))
    assert found["model.layers.0.mlp.down_proj.weight"].keys() == {FORMATS[0]}
    assert found["model.layers.0.mlp.[gu]*_proj.weight"].keys() == set(FORMATS)
