"""What the plain installation leaves out, and which extra of the package brings it."""

from importlib.util import find_spec

from transmla.errors import UnsupportedError

# extra -> modules that it brings
EXTRAS = {
    "eval": ("lm_eval", "datasets"),
    "heal": ("peft", "matplotlib"),
    "report": ("jinja2", "matplotlib", "jsonschema"),
    "data": ("datasets",),
    "needles": ("wonderwords", "nltk"),
}


def needs(extra: str, what: str) -> None:
    """Raise `UnsupportedError`, which names the extra, if one of its modules is not installed.

    what: that needs it, as "lm-eval's tasks"
    """
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    if missing:
        raise UnsupportedError(
            f"{what} needs packages that are not installed",
            where=", ".join(missing),
            why=f"they belong to the extra [{extra}], which keeps the plain installation small",
            remedy=f"pip install 'transmla[{extra}]'",
        )
