"""All errors that are raised on purpose, with the exit codes that the command line returns.

    TransmlaError             1   base class; also unexpected failures
    (click usage errors)      2   unknown option, missing argument
    ├── SourceError           3   source not found, unreadable, truncated, mis-shaped or NaN
    ├── UnsupportedError      4   a model, option or combination that this version does not support
    ├── GateError             5   a measured quality is below the required one
    ├── GeometryError         6   the requested latent or rotary size is impossible
    ├── DataError             7   calibration or evaluation text missing, unreadable or too short
    ├── DestinationError      8   output exists, is not writable, or does not fit on the disk
    ├── VerificationError     9   the written model does not compute what it should
    └── RecipeError          10   unknown recipe or suite, unknown key, a value of the wrong type
    (interrupted, ctrl-C)   130   the same command resumes from DST.partial, the only thing that is left
    (SIGTERM)               143   likewise

Every message has four parts: what happened, where, why, and what to do about it.
"""


class TransmlaError(Exception):
    """Base class of all errors that are raised on purpose. `str(error)` is the message that users see.

    what:   what is wrong or could not be done, in one sentence
    where:  the file, tensor, option or layer concerned
    why:    the reason
    remedy: what the user can do about it
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str, why: str, remedy: str) -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        super().__init__(f"{what}\n  where: {where}\n  why:   {why}\n  fix:   {remedy}")


class SourceError(TransmlaError):
    """The source checkpoint is missing, unreadable, truncated, mis-shaped or not finite."""

    exit_code = 3


class UnsupportedError(TransmlaError):
    """The model has a structure, or the command has options, that this version does not support."""

    exit_code = 4


class GateError(TransmlaError):
    """A measured quality is below the required one."""

    exit_code = 5


class GeometryError(TransmlaError):
    """The requested `kv_lora_rank` or `qk_rope_head_dim` is impossible for this model."""

    exit_code = 6


class DataError(TransmlaError):
    """Calibration or evaluation text is missing, unreadable or too short."""

    exit_code = 7


class DestinationError(TransmlaError):
    """The output exists already, cannot be written, or would not fit on the disk."""

    exit_code = 8


class VerificationError(TransmlaError):
    """The written checkpoint does not compute what the converter computed."""

    exit_code = 9


class RecipeError(TransmlaError):
    """A recipe or suite is unknown, has an unknown key, or a value of the wrong type."""

    exit_code = 10
