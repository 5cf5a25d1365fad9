"""Generation through a real bundle, against transformers on the same checkpoint."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralForCausalLM

from galerne.errors import BackendError, InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.generate import Generation
from galerne.runtime.model import Model
from galerne.runtime.sampling import SamplingOptions
from galerne.runtime.tokenizer import Tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
CHUNK = 8  # of the bundles in conftest.py
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def reference(checkpoint_folder: Path) -> MistralForCausalLM:
    model: MistralForCausalLM = MistralForCausalLM.from_pretrained(
        checkpoint_folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    return model


@pytest.fixture(scope="module")
def model(bundle_of: Bundles) -> Model:
    return Model.open(bundle_of("fp32").path)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 501, count)]


def greedy(reference: MistralForCausalLM, prompt: list[int], count: int) -> list[int]:
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(prompt) :]]


def generate(model: Model, prompts: list[list[int]], count: int, **options: object) -> list[list[int]]:
    generation = Generation(model, prompts, max_new_tokens=count, ignore_eos=True, **options)  # type: ignore[arg-type]
    list(generation)
    return [output.ids for output in generation.outputs]


def test_greedy_equals_transformers_for_rows_of_different_lengths(model: Model, reference: MistralForCausalLM) -> None:
    prompts = [tokens(70), tokens(3, seed=1), tokens(17, seed=2)]
    assert generate(model, prompts, 60) == [greedy(reference, prompt, 60) for prompt in prompts]


def test_rows_do_not_change_each_other(model: Model) -> None:
    prompts = [tokens(5, seed=seed) for seed in range(3)]
    sampling = SamplingOptions(temperature=0.9, top_p=0.95, seed=4)
    together = generate(model, prompts, 30, sampling=sampling)
    assert together == [generate(model, [prompt], 30, sampling=sampling)[0] for prompt in prompts]


def test_cache_is_updated_in_place(model: Model) -> None:
    rows = model.rows(full_ring=True)
    before = [array.ctypes.data for array in rows.cache.arrays()]
    rows.feed([tokens(5)])
    arrays = rows.cache.arrays()
    assert [array.ctypes.data for array in arrays] == before
    assert all(np.abs(array[:, :, :5]).sum() > 0 and np.abs(array[:, :, 8:]).sum() == 0 for array in arrays)


def test_last_logits_equal_those_of_every_token(model: Model) -> None:
    prompt = tokens(50)
    every = model.rows().feed_all([prompt])[0]
    rows = model.rows()
    assert np.array_equal(rows.feed([prompt])[0], every[-1])
    assert rows.lengths == [50]
    stepped = model.rows()
    for i, token in enumerate(prompt):
        assert np.allclose(stepped.feed([[token]])[0], every[i], atol=1e-4)


def test_a_rewound_row_goes_on_as_if_the_tokens_had_never_been_fed(model: Model) -> None:
    """Rows of two lengths, before and after the ring wraps; what was taken back is replaced by other tokens."""
    for lengths in ([20, 9], [90, 71]):
        kept = [tokens(length, seed=length) for length in lengths]
        other = [tokens(CHUNK, seed=5), tokens(3, seed=6)]
        rows, fresh = model.rows(2), model.rows(2)
        fresh.feed(kept)
        rows.feed(kept)
        for wrong in range(3):
            rows.feed([tokens(6, seed=wrong), tokens(6, seed=wrong + 3)])
            assert min(rows.rewindable) >= 6
            rows.rewind([6, 6])
            assert rows.lengths == lengths
        assert np.allclose(rows.feed(other), fresh.feed(other), atol=1e-5)
        assert np.allclose(rows.feed([[1], [2]]), fresh.feed([[1], [2]]), atol=1e-5)


def test_rewinding_further_than_the_ring_holds_says_how_far_it_goes(model: Model) -> None:
    rows = model.rows()
    for token in tokens(60):
        rows.feed([[token]])
    assert rows.rewindable == [CHUNK + 1]
    with pytest.raises(InputError, match="rewind by 10 tokens: the ring can take back 9, or all 60 to start anew"):
        rows.rewind([10])
    rows.rewind([60])
    assert np.array_equal(rows.feed([tokens(7)]), model.rows(full_ring=True).feed([tokens(7)]))


def test_eos_ends_a_row_and_is_not_given_out(model: Model, reference: MistralForCausalLM) -> None:
    free = generate(model, [tokens(9)], 20)[0]
    cut = free.index(free[7])
    ended = Model(model.bundle, model.engine, 0.0)
    ended.facts = dataclasses.replace(model.facts, eos_token_ids=(free[7],))
    generation = Generation(ended, [tokens(9)], max_new_tokens=20)
    list(generation)
    assert generation.outputs[0].ids == free[:cut]
    assert generation.outputs[0].stop_reason == "eos"


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[]], 5, "prompt 0: empty"),
        ([[501]], 5, "id 501 is not in the vocabulary of 501"),
        ([[-1]], 5, "id -1 is not"),
        ([[1]], 0, "--max-new-tokens: expected at least 1, found 0"),
    ],
)
def test_bad_prompts(model: Model, prompts: list[list[int]], count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, prompts, count)


def test_bfloat16_says_what_to_do(bundle_of: Bundles) -> None:
    with pytest.raises(BackendError, match="does not compute in bfloat16; build the cpu engine"):
        Model.open(bundle_of("bf16").path)


def test_memory_is_flat_and_tokens_right_far_past_the_window(model: Model, reference: MistralForCausalLM) -> None:
    """Thousands of tokens, more than a hundred times around the ring."""
    psutil = pytest.importorskip("psutil")
    generation = Generation(model, [tokens(4)], max_new_tokens=3000, ignore_eos=True)
    resident, process = [], psutil.Process()
    for index, _ in enumerate(generation):
        if index in (500, 2999):
            resident.append(process.memory_info().rss)
    assert resident[1] - resident[0] < 5e6
    ids = [*tokens(4), *generation.outputs[0].ids]
    # Two layers of a window of 16 see no further back than 30 tokens, so a reference over the last 200 knows all.
    with torch.no_grad():
        logits = reference(torch.tensor([ids[-200:-1]])).logits[0]
    assert logits[-64:].argmax(-1).tolist() == ids[-64:]


class Foresight:
    """Drafts what plain generation gave, with an error here and there: every way in which a draft can be right or wrong."""

    def __init__(self, plain: list[int], seed: int) -> None:
        self._plain, self._random, self._known = plain, np.random.default_rng(seed), 0

    def append(self, token: int) -> None:
        assert token == self._plain[self._known]
        self._known += 1

    def draft(self, limit: int) -> list[int]:
        count = min(int(self._random.integers(0, 7)), max(0, limit))
        draft = self._plain[self._known : self._known + count]
        return [token if self._random.random() < 0.7 else 500 - token for token in draft]

    def kept(self, drafted: int, kept: int) -> None:
        assert kept <= drafted


@pytest.mark.parametrize("sampling", [SamplingOptions(), SamplingOptions(temperature=0.8, seed=1)])
def test_speculation_changes_no_token(model: Model, sampling: SamplingOptions) -> None:
    """Past the window and the ring's end, for rows whose drafts differ in length and in how many are right."""
    prompts = [tokens(30), tokens(3, seed=1), tokens(17, seed=2)]
    plain = generate(model, prompts, 70, sampling=sampling)
    generation = Generation(model, prompts, max_new_tokens=70, ignore_eos=True, sampling=sampling, speculate=6)
    generation._lookups = [Foresight(row, seed) for seed, row in enumerate(plain)]  # type: ignore[misc]
    given = list(generation)
    assert [[token for row, token in given if row == wanted] for wanted in range(3)] == plain
    assert [output.ids for output in generation.outputs] == plain
    assert generation.timings.drafted_tokens > 100
    assert generation.timings.decode_tokens == 3 * 69


def test_speculation_takes_fewer_runs_where_the_text_repeats(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(EXAMPLES / "tiny-mistral")
    model = Model.open(export(checkpoint, recipe.load("fp32"), tmp_path_factory.mktemp("tiny") / "bundle").path)
    prompt = Tokenizer.open(model.bundle).encode("The harbour is quiet. The boats are in. " * 4)
    runs: list[int] = []
    run = model.engine.run

    def counted(*args: Any) -> Any:
        runs.append(args[1].shape[1])
        return run(*args)

    monkeypatch.setattr(model.engine, "run", counted)
    plain = generate(model, [prompt], 150)
    count = len(runs)
    assert generate(model, [prompt], 150, speculate=8) == plain
    assert max(runs[count + 1 :]) <= 9
    assert len(runs) - count < 0.85 * count


def test_speculation_ends_at_the_longest_context(checkpoint_folder: Path, tmp_path: Path) -> None:
    bundle = export(
        open_checkpoint(checkpoint_folder), recipe.load("fp32"), tmp_path / "b", chunk=CHUNK, max_context=60
    )
    model = Model.open(bundle.path)
    outputs = []
    for speculate in (0, 6):
        generation = Generation(model, [tokens(20)], max_new_tokens=90, ignore_eos=True, speculate=speculate)
        list(generation)
        outputs.append(generation.outputs[0])
    assert outputs[0] == outputs[1]
    assert (outputs[1].stop_reason, len(outputs[1].ids)) == ("context", 41)


def test_a_negative_draft_is_refused(model: Model) -> None:
    with pytest.raises(InputError, match="--speculate: expected 0 or more, found -1"):
        Generation(model, [[1]], max_new_tokens=1, speculate=-1)
