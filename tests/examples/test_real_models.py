"""The two real models of the examples, the whole way."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM

from galerne.cli.demo import smollm2
from galerne.errors import BackendError, InputError
from galerne.export.checkpoint.open import open_checkpoint
from galerne.export.export import export
from galerne.optimize.builders.build import build
from galerne.optimize.quantize import recipe
from galerne.runtime.bundle import Bundle
from galerne.runtime.chat import ChatTemplate
from galerne.runtime.engines.record import load_record
from galerne.runtime.engines.select import open_engine
from galerne.runtime.engines.tensorrt.driver import gpu_count
from galerne.runtime.generate import Generation, TextGeneration
from galerne.runtime.model import Model
from galerne.runtime.tokenizer import Tokenizer
from galerne.targets import target

TINY = Path(__file__).parents[2] / "examples" / "tiny-mistral"
Examples = Callable[[str, str], Bundle]


def source(model: str) -> Path:
    if model == "tiny-mistral":
        return TINY
    try:
        return smollm2()
    except InputError as exc:
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    """Return the bundle of an example in a recipe; made once."""
    made: dict[tuple[str, str], Bundle] = {}

    def get(model: str, name: str) -> Bundle:
        if (model, name) not in made:
            out = tmp_path_factory.mktemp(model) / name
            made[model, name] = export(open_checkpoint(source(model)), recipe.load(name), out)
        return made[model, name]

    return get


def answer(bundle: Bundle, question: str) -> str:
    model, tokenizer = Model.open(bundle.path), Tokenizer.open(bundle)
    template = ChatTemplate.open(bundle)
    assert template is not None
    prompt = tokenizer.encode(template.render([{"role": "user", "content": question}]), special=False)
    text = TextGeneration(Generation(model, [prompt], max_new_tokens=40), tokenizer)
    return "".join(text)


def test_smollm2_at_int4_knows_the_capital_of_france(example: Examples) -> None:
    assert "Paris" in answer(example("smollm2", "int4-rtn"), "What is the capital of France?")


@pytest.mark.slow
def test_smollm2_at_fp32_gives_transformers_tokens(example: Examples) -> None:
    path = source("smollm2")
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    bundle = example("smollm2", "fp32")
    prompt = Tokenizer.open(bundle).encode("The three laws of thermodynamics are")
    with torch.no_grad():
        out = reference.generate(
            torch.tensor([prompt]), max_new_tokens=100, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    generation = Generation(Model.open(bundle.path), [prompt], max_new_tokens=100, ignore_eos=True)
    list(generation)
    assert generation.outputs[0].ids == out[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_twenty_thousand_tokens_past_the_window(example: Examples) -> None:
    """Memory stays flat, and the last tokens are the ones that PyTorch picks over all that can be seen of them."""
    psutil = pytest.importorskip("psutil")
    bundle = example("tiny-mistral", "fp32")
    prompt = Tokenizer.open(bundle).encode("import os\n")
    generation = Generation(Model.open(bundle.path), [prompt], max_new_tokens=20_000, ignore_eos=True)
    process, resident = psutil.Process(), []
    for index, _ in enumerate(generation):
        if index in (1_000, 19_999):
            resident.append(process.memory_info().rss)
    assert resident[1] - resident[0] < 5e6
    ids = [*prompt, *generation.outputs[0].ids]
    # Four layers of a window of 128 see no further back than 4 * 127 tokens: the last 700 and their positions say all.
    positions = torch.arange(len(ids) - 700, len(ids) - 1)[None]
    reference = MistralForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = reference(torch.tensor([ids[-700:-1]]), position_ids=positions).logits[0]
    assert logits[-64:].argmax(-1).tolist() == ids[-64:]


@pytest.mark.tensorrt
@pytest.mark.parametrize("name", ["fp16", "int4-rtn"])
@pytest.mark.parametrize("model", ["tiny-mistral", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_tensorrt_rtx_builds_ahead_of_time(example: Examples, model: str, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="lacks tensorrt-rtx-cu13")
    built = build(example(model, name), target.load("rtx-4090"))
    record = load_record(built, "rtx-4090")
    assert record.compute_capability == "8.9"
    assert [(profile.name, profile.tokens) for profile in record.profiles] == [
        ("decode", (1, 1, 2)),
        ("prefill", (1, 256, 256)),
    ]
    if not gpu_count():
        with pytest.raises(BackendError, match=r"this machine has no NVIDIA (driver|GPU)"):
            open_engine(built, "rtx-4090")


def test_the_session_example_runs(example: Examples) -> None:
    script = TINY.parent / "session.py"
    command: list[str | Path] = [sys.executable, script, example("tiny-mistral", "fp32").path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    one, another, rewound, saved, cancelled = done.stdout.splitlines()
    assert len({one, another, rewound}) == 3
    assert saved.startswith("saved ")
    assert cancelled.startswith("cancelled: ")
