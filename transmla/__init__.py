"""transmla: retrofit multi-head latent attention (MLA) onto pretrained GQA, MHA and MQA language models.

    import transmla

    transmla.plan("llama-3-8b", latent=512)                  # headers only: what would happen
    transmla.convert("llama-3-8b", "OUT", latent=512)        # -> ConversionReport
    transmla.evaluate("OUT", against="SRC")                  # -> EvaluationReport
    transmla.doctor("OUT")                                   # -> Diagnosis: which engines take it
    transmla.export("OUT", "OUT.gguf", type="q8_0")          # for llama.cpp; or to="vllm", padded for GPU kernels
    transmla.bench("OUT", against="SRC")                     # -> BenchReport: prefill and decoding, roofline
    transmla.report(["a.json"], "report.html")               # what `eval --json` wrote, as one page
    transmla.heal("OUT", tokens=10_000_000)                  # -> HealReport: distilled from the source
    transmla.unfold("OUT", "TRAIN"), transmla.fold("TRAIN", "OUT2")  # the form for training, and back
    transmla.load("OUT")                                     # -> a transformers model, latent cache, absorbed decode
    for piece in transmla.generate("OUT", "Once upon a time"):
        print(piece, end="")

Everything the command line does is one of these calls. Errors are those of `transmla.errors`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmla.conversion.flow import convert as convert
    from transmla.conversion.plan import plan as plan
    from transmla.evaluation.evaluate import evaluate as evaluate
    from transmla.evaluation.report.page import report as report
    from transmla.evaluation.speed import bench as bench
    from transmla.healing.flow import heal as heal
    from transmla.model.generation import generate as generate
    from transmla.model.loading import load as load
    from transmla.targets.doctor import doctor as doctor
    from transmla.targets.export import export as export
    from transmla.targets.fold import fold as fold
    from transmla.targets.fold import unfold as unfold

# imported when first used: `transmla --help` must not wait for torch
_PUBLIC = {
    "bench": "transmla.evaluation.speed",
    "convert": "transmla.conversion.flow",
    "doctor": "transmla.targets.doctor",
    "evaluate": "transmla.evaluation.evaluate",
    "export": "transmla.targets.export",
    "fold": "transmla.targets.fold",
    "generate": "transmla.model.generation",
    "heal": "transmla.healing.flow",
    "load": "transmla.model.loading",
    "plan": "transmla.conversion.plan",
    "report": "transmla.evaluation.report.page",
    "unfold": "transmla.targets.fold",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'transmla' has no attribute {name!r}")
