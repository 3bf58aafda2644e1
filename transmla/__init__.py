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
    from transmla.conversion import convert as convert
    from transmla.diagnosis import doctor as doctor
    from transmla.evaluation.evaluate import evaluate as evaluate
    from transmla.evaluation.report import report as report
    from transmla.evaluation.speed import bench as bench
    from transmla.exporting import export as export
    from transmla.folding import fold as fold
    from transmla.folding import unfold as unfold
    from transmla.generation import generate as generate
    from transmla.healing.flow import heal as heal
    from transmla.loading import load as load
    from transmla.planning import plan as plan

# imported when first used: `transmla --help` must not wait for torch
_PUBLIC = {
    "bench": "transmla.evaluation.speed",
    "convert": "transmla.conversion",
    "doctor": "transmla.diagnosis",
    "evaluate": "transmla.evaluation.evaluate",
    "export": "transmla.exporting",
    "fold": "transmla.folding",
    "generate": "transmla.generation",
    "heal": "transmla.healing.flow",
    "load": "transmla.loading",
    "plan": "transmla.planning",
    "report": "transmla.evaluation.report",
    "unfold": "transmla.folding",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'transmla' has no attribute {name!r}")
