"""The verdict on a bundle: does it compute what its PyTorch source computes?"""

import dataclasses
from collections import OrderedDict
from pathlib import Path

import numpy as np
from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER

from galerne.errors import InputError
from galerne.export.checkpoint.checkpoint import Checkpoint
from galerne.export.parity.candidate import CandidateRunner
from galerne.export.parity.cases import make_plan
from galerne.export.parity.compare import compare_case
from galerne.export.parity.float16 import float16_logits, widened
from galerne.export.parity.reference import ReferenceRunner
from galerne.export.parity.report import AgainstSource, Report, Unrounded
from galerne.export.parity.streamed import source_window
from galerne.export.parity.tolerances import TABLE, Arithmetic, arithmetic
from galerne.export.parity.unrounded import compare_rounding, unrounded
from galerne.files import sha256_file
from galerne.optimize.quantize.recipe import AnyRecipe, read_resolved
from galerne.progress import Task, step
from galerne.runtime.bundle import MANIFEST, Bundle
from galerne.runtime.engines.select import PORTABLE
from galerne.runtime.measures import kl, top1_agreement


def verify(bundle: Bundle, checkpoint: Checkpoint, *, engine: str | None = None, adapter: Path | None = None) -> Report:
    """Run a bundle and its checkpoint in transformers on the same tokens, and compare.

    The reference's weights are rounded as the bundle's recipe rounds them, so that the limits can be tight enough to show a
    wrong graph; what the rounding costs is reported apart. Where inputs, or keys and values, are rounded too, no tight limit
    holds for the logits, so a portable graph's rounding is compared with the checkpoint's exactly, and the graph is run without
    it as well (see `unrounded`). Nothing is written: see `Bundle.with_verdict`.

    Args:
        engine: what runs the bundle: "portable", which is the default, or an engine's name.
        adapter: the folder of a LoRA adapter that both run with, for a bundle with adapter slots.
    Raises: InputError if the checkpoint is not what the bundle was made from, or a file of the bundle was changed;
        BackendError if the engine cannot run here.
    """
    engine = engine or PORTABLE
    with step("check hashes"):
        check_source(bundle, checkpoint)
        bundle.verify_hashes()
    recipe = read_resolved(bundle.manifest.recipe, f"{bundle.path / MANIFEST}: recipe")
    report = _run(bundle, checkpoint, recipe, arithmetic(recipe, engine), engine, adapter)
    if (recipe.activations is None and recipe.cache is None) or engine != PORTABLE:
        return report
    scales = compare_rounding(bundle, checkpoint)
    with unrounded(bundle) as plain:
        proof = _run(
            plain,
            checkpoint,
            recipe,
            "float32" if recipe.compute == "float32" else "float16",
            engine,
            adapter,
            rounded_inputs=False,
        )
    cases = (scales, *(dataclasses.replace(case, name=f"not rounded: {case.name}") for case in proof.cases))
    passed = report.passed and all(case.passed for case in cases)
    return dataclasses.replace(report, passed=passed, unrounded=Unrounded(proof.arithmetic, proof.tolerances, cases))


def _run(
    bundle: Bundle,
    checkpoint: Checkpoint,
    recipe: AnyRecipe,
    row: Arithmetic,
    engine: str,
    adapter: Path | None,
    *,
    rounded_inputs: bool = True,
) -> Report:
    tolerance = TABLE[row]
    plan = make_plan(bundle.manifest, source_window(checkpoint), greedy=tolerance.greedy)
    with Task("parity", 2 * len(plan.cases)) as task:
        candidate = CandidateRunner(bundle, engine, plan, task.advance, adapter)
        reference = ReferenceRunner(
            checkpoint,
            recipe,
            plan,
            task.advance,
            generated=candidate.generated,
            tolerance=tolerance,
            adapter=adapter,
            rounded_inputs=rounded_inputs,
        )
        feeds = [OrderedDict(case=np.array([number], np.int64)) for number in range(len(plan.cases))]
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # its log goes to stdout
            # The candidate first, since the reference follows what it generated.
            results = RunResults(list(Comparator.run([candidate, reference], data_loader=feeds))[::-1])
    wanted, got = (iterations[plan.cases.index(plan.longest)][plan.longest.outputs[0]] for _, iterations in results)
    logits_std = float(np.std(wanted))
    source = reference.source_logits
    limits = tolerance.limits(logits_std)
    runs = list(results.split())
    cases = tuple(compare_case(case, run, limits) for case, run in zip(plan.cases, runs, strict=True))
    if row == "float16" and not all(case.passed for case in cases):
        with step("what float16 does to the reference"):
            rounded = float16_logits(checkpoint, recipe, plan, adapter, rounded_inputs=rounded_inputs)
        limits = widened(limits, wanted, rounded, logits_std)
        cases = tuple(compare_case(case, run, limits) for case, run in zip(plan.cases, runs, strict=True))
    return Report(
        passed=all(case.passed for case in cases),
        engine=engine,
        recipe=recipe.description,
        reference=f"transformers {bundle.manifest.model.architecture}: eager attention, float32, weights rounded by the recipe",
        arithmetic=row,
        logits_std=logits_std,
        tolerances=limits,
        cases=cases,
        against_source=AgainstSource(
            plan.longest.name, float(np.abs(source - got).max()), kl(source, got), top1_agreement(source, got)
        ),
    )


def check_source(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raises: InputError if a file of the checkpoint is not the one that the bundle was made from."""
    made_from = bundle.manifest.source.files
    files = {path.name: path for path in checkpoint.files()}
    for name in sorted(made_from.keys() | files.keys()):
        expected = made_from[name].sha256[:12] + "…" if name in made_from else "no such file"
        found = sha256_file(files[name])[:12] + "…" if name in files else "no such file"
        if found != expected:
            raise InputError(
                f"{bundle.path} was made from another checkpoint than {checkpoint.path}: {name}: expected {expected}, found "
                f"{found}; give the one it was made from, or export again"
            )
