"""transmla: retrofit multi-head latent attention (MLA) onto pretrained GQA, MHA and MQA language models.

    import transmla

    transmla.plan("llama-3-8b", latent=512)              # sizes, memory and engines, from headers only
    transmla.convert("llama-3-8b", "OUT", latent=512)    # convert a model; returns a ConversionReport
    transmla.evaluate("OUT", against="SRC")              # measure it against its source; returns an EvaluationReport
    transmla.doctor("OUT")                               # which engines run it; returns a Diagnosis
    transmla.verify("OUT")                               # is it what was written; returns a Verified
    transmla.export("OUT", "OUT.gguf", type="q8_0")      # for llama.cpp, or with to="vllm" padded for GPU kernels
    transmla.push("OUT", "you/name")                     # to a model hub, with its model card; returns its address
    transmla.quantise("OUT", "OUT2")                     # a basis that is easy to round; returns a QuantiseReport
    transmla.bench("OUT", against="SRC")                 # speed of prefill and decoding; returns a BenchReport
    transmla.report(["a.json"], "report.html")           # a page with the results of `eval --json`
    transmla.heal("OUT", tokens=10_000_000)              # distil from the source; returns a HealReport
    transmla.unfold("OUT", "TRAIN")                      # the form for training
    transmla.fold("TRAIN", "OUT2")                       # and back
    transmla.list_recipes(), transmla.list_families()    # what can be converted, and what it would become
    transmla.load("OUT")                                 # a transformers model that caches the latent
    transmla.register()                                  # transformers' Auto classes load folders of all forms
    for piece in transmla.generate("OUT", "Once upon a time"):
        print(piece, end="")

Every command of the command line is one of these calls. They raise the errors of `transmla.errors`, and their reports
print as the tables of the command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from transmla.conversion.diagnosis import doctor as doctor
    from transmla.conversion.flow import convert as convert
    from transmla.conversion.listing import list_families as list_families
    from transmla.conversion.listing import list_recipes as list_recipes
    from transmla.conversion.plan import plan as plan
    from transmla.evaluation.evaluate import evaluate as evaluate
    from transmla.evaluation.report.page import report as report
    from transmla.evaluation.speed import bench as bench
    from transmla.healing.flow import heal as heal
    from transmla.model.generation import generate as generate
    from transmla.model.loading import load as load
    from transmla.model.loading import register as register
    from transmla.targets.export import export as export
    from transmla.targets.fold import fold as fold
    from transmla.targets.fold import unfold as unfold
    from transmla.targets.push import push as push
    from transmla.targets.quantise import quantise as quantise
    from transmla.targets.verify import verify as verify

# imported on first use, so that `transmla --help` does not have to wait for torch
_PUBLIC = {
    "bench": "transmla.evaluation.speed",
    "convert": "transmla.conversion.flow",
    "doctor": "transmla.conversion.diagnosis",
    "evaluate": "transmla.evaluation.evaluate",
    "export": "transmla.targets.export",
    "fold": "transmla.targets.fold",
    "generate": "transmla.model.generation",
    "heal": "transmla.healing.flow",
    "list_families": "transmla.conversion.listing",
    "list_recipes": "transmla.conversion.listing",
    "load": "transmla.model.loading",
    "plan": "transmla.conversion.plan",
    "push": "transmla.targets.push",
    "quantise": "transmla.targets.quantise",
    "register": "transmla.model.loading",
    "report": "transmla.evaluation.report.page",
    "unfold": "transmla.targets.fold",
    "verify": "transmla.targets.verify",
}

# calls that an extra of the same name has the packages of
_EXTRAS = ("heal", "report")

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        if name in _EXTRAS:
            from transmla.extras import needs

            needs(name, f"`{name}`")
        return getattr(import_module(_PUBLIC[name]), name)
    if name == "__version__":
        from importlib import metadata

        return metadata.version("transmla")
    raise AttributeError(f"module 'transmla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
