"""From what the user typed to a folder: a path, the embedded model, or a hub id, in this order."""

import difflib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from transmla.errors import SourceError
from transmla.recipe import find_recipe, list_recipes, load_recipe

EMBEDDED_MODELS = ("stories260k",)

# fnmatch lets * match slashes; folders of a repository hold other formats and original checkpoints
_IGNORED = ["*/*", "consolidated*"]
_COMPANIONS = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "LICENSE*", "NOTICE*"]
_SAFETENSORS = ["*.safetensors", *_COMPANIONS]
_BIN = ["pytorch_model*.bin"]
_TEMPLATES = ["additional_chat_templates/*.jinja"]


@dataclass(frozen=True)
class ResolvedSource:
    """Where the model is; `revision` is the commit hash of a hub id, else None."""

    path: Path
    name: str
    revision: str | None
    # only config and tokenizer have been downloaded; `path` holds no weights
    weights_on_hub: bool = False


def resolve(name: str, revision: str | None = None, *, headers_only: bool = False) -> ResolvedSource:
    """Find the model that `name` means, downloading it if it is a hub id; `SourceError` if there is none.

    revision:     commit, branch or tag; hub ids only
    headers_only: leave weights that are not in the local cache on the hub
    """
    if (found := local(name)) is not None:
        path = found
    elif looks_like_path(name):
        kind = "file" if name.lower().endswith(".gguf") else "folder"
        raise _not_found(name, f"no such {kind}", "check the path")
    elif name in EMBEDDED_MODELS:
        path = _embedded(name)
    elif "/" in name:
        return _from_hub(name, revision, headers_only)
    else:
        why = "it is not a folder, a .gguf file, an embedded model or a hub id (owner/name)"
        raise _not_found(name, why, "pass one of these, or a recipe")
    if revision is not None:
        raise _not_found(name, f"revision {revision!r} was given, but only hub ids have revisions", "leave it out")
    return ResolvedSource(path, name, None)


def local(name: str) -> Path | None:
    """The file or folder that is there by this name; none for what cannot be a path, as it is too long."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, of nobody's home, with a zero
        return None


def looks_like_path(name: str) -> bool:
    """Whether a name that is no file or folder was meant as one, and not as a hub id."""
    owner, _, rest = name.partition("/")
    return (
        name.startswith(("/", "./", "../", "~"))
        or "/" in rest
        or name.endswith((".gguf", "/"))
        or (bool(rest) and local(owner) is not None)
    )


def _embedded(name: str) -> Path:
    folder = Path(str(resources.files("transmla") / "data" / name))
    if not folder.is_dir():
        raise _not_found(name, "the embedded model is missing from this installation", "install transmla again")
    return folder


def _from_hub(name: str, revision: str | None, headers_only: bool) -> ResolvedSource:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    def download(patterns: list[str], ignored: list[str] = _IGNORED) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=ignored))

    try:
        folder = download(_COMPANIONS if headers_only else _SAFETENSORS)
        if headers_only and (folder / "config.json").is_file():
            return ResolvedSource(folder, name, folder.name, not _has_weights(folder))
        if not any((folder / f"model.safetensors{index}").is_file() for index in ("", ".index.json")):
            folder = folder if headers_only else download(_BIN)
            if not _has_weights(folder):
                _refuse_other_kinds(name, revision)
        folder = download(_TEMPLATES, [])
    except SourceError:
        raise
    except hub.GatedRepoError as error:
        remedy = "accept its terms on its page and log in with `hf auth login`"
        raise _not_found(name, "access to it is restricted", remedy) from error
    except hub.RevisionNotFoundError as error:
        raise _not_found(name, f"it has no revision {revision!r}", "check the commit, branch or tag") from error
    except hub.RepositoryNotFoundError as error:
        why = "there is no such model on the hub, or it is private"
        raise _not_found(name, why, "check the spelling, or log in with `hf auth login`") from error
    except hub.HFValidationError as error:
        raise _not_found(name, f"not a hub id: {error}", "pass owner/name") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError) as error:
        why = "it is not in the local cache, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        raise _not_found(name, why, "connect, or pass a folder on this machine") from error
    except Exception as error:  # whatever else a network can do, of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _not_found(name, f"the download failed: {reason}", "try again; finished files are kept") from error
    # the hub cache keeps one folder for each commit, named by its hash
    return ResolvedSource(folder, name, folder.name)


def _refuse_other_kinds(name: str, revision: str | None) -> None:
    """`SourceError` for a repository that holds something else than a model in transformers' form."""
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name, revision=revision)
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if ggufs:
        why = f"it has no safetensors, but {len(ggufs)} GGUF file{'s' if len(ggufs) > 1 else ''}: {ggufs[0]}"
        why += " ..." if len(ggufs) > 1 else ""
        raise _not_found(name, why, f"download one and pass that file: hf download {name} {ggufs[0]}")
    if "adapter_config.json" in files:
        raise _not_found(name, "it holds an adapter, not a model", "merge the adapter into its base model first")


def _has_weights(folder: Path) -> bool:
    """Whether a folder of the cache holds all weights; a download that was interrupted leaves some of them."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if (folder / whole).is_file():
            return True
        try:
            files = set(json.loads((folder / f"{whole}.index.json").read_bytes())["weight_map"].values())
            if files and all((folder / file).is_file() for file in files):
                return True
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that is damaged
            continue
    return False


def _not_found(name: str, why: str, remedy: str) -> SourceError:
    recipes = list_recipes()
    if any(load_recipe(path).source == name for path in map(find_recipe, recipes) if path):
        # it is what the recipe stands for that was asked for
        return SourceError("the model was not found", where=name, why=why, remedy=remedy)
    known = sorted({*EMBEDDED_MODELS, *recipes})
    near = difflib.get_close_matches(name.rpartition("/")[2].lower(), known, n=3, cutoff=0.5)
    hints = [remedy]
    if near:
        hints.append(f"did you mean {' or '.join(near)}?")
    hints.append(f"known recipes and models: {', '.join(known)}")
    return SourceError("the model was not found", where=name or "''", why=why, remedy="; ".join(hints))
