"""Builds an engine from a plan that another machine made, and enters it into the bundle. Needs neither onnx nor torch."""

from pathlib import Path

from galerne.errors import InputError
from galerne.files import staged_folder
from galerne.optimize.builders.tensorrt.build_plan import NETWORK, PLAN, load_plan
from galerne.optimize.builders.tensorrt.compile import compile_plan
from galerne.runtime.bundle import ENGINES, WEIGHTS, Bundle
from galerne.runtime.engines.record import RECORD


def build_from_plan(bundle: Bundle, folder: Path) -> Bundle:
    """Build the engine of a plan into `engines/<target>`, in the place of one that is there.

    Args:
        folder: holds the plan's `build.json` and `network.onnx`.
    Returns: the bundle that lists the engine.
    Raises: InputError if the plan is of another bundle; and as `compile_plan`.
    """
    plan = load_plan(folder / PLAN)
    for name, sha256 in plan.inputs.items():
        entry = bundle.manifest.files.get(name)
        if entry is None or entry.sha256 != sha256:
            found = f"{entry.sha256[:12]}…" if entry else "no such file"
            raise InputError(
                f"{folder / PLAN}: inputs: made from {name} {sha256[:12]}…, the bundle's is {found}; plan it anew"
            )
    bundle.verify_hashes(plan.inputs)
    place = f"{ENGINES}/{plan.target}"
    bundle.file(ENGINES).mkdir(exist_ok=True)
    with staged_folder(bundle.file(place), replace=True) as staging:
        record = compile_plan(plan, folder / NETWORK, bundle.file(WEIGHTS), staging)
        (staging / RECORD).write_bytes(record.to_json())
    return bundle.with_files(place, sorted(f"{place}/{path.name}" for path in bundle.file(place).iterdir()))
