"""Every exception and warning of the library: what was got, what was needed, what to do."""


class RepeUnlearnError(Exception):
    """Root of all errors raised on purpose by this package."""


class InputError(RepeUnlearnError, ValueError):
    """An argument has the right type but an unusable value."""


class ShapeError(InputError):
    """A tensor has the wrong shape, width or dtype family."""


class NonFiniteError(InputError):
    """A tensor holds NaN or infinite values."""


class NotEnoughDataError(InputError):
    """Too few examples, classes or tokens for what was asked."""


class UnknownSiteError(InputError):
    """A site names no module of the model."""


class UnsupportedArchitectureError(RepeUnlearnError):
    """The model family has no row in the architecture table."""


class UnsupportedModelError(RepeUnlearnError):
    """The family is known, but this instance (compiled, offloaded, quantised) cannot be used this way."""


class ModelMismatchError(RepeUnlearnError):
    """A plan or patch was made for another model."""


class NotBakeableError(RepeUnlearnError):
    """A site has no (exact enough) equivalent in the weights.

    Attributes:
        site: the site that cannot be baked.
        reason: why.
        instead: what to do instead.
    """

    def __init__(self, site: object, reason: str, instead: str):
        self.site, self.reason, self.instead = site, reason, instead
        super().__init__(f"{site} cannot be baked: {reason}. Instead: {instead}.")


class FileFormatError(RepeUnlearnError):
    """A file is truncated, foreign, or of a version that this release cannot read."""


class OutputExistsError(RepeUnlearnError, FileExistsError):
    """The output path exists and overwriting was not asked for."""


class MissingDependencyError(RepeUnlearnError, ImportError):
    """An optional package is needed; the message holds the exact install line."""


class VerificationError(RepeUnlearnError):
    """At least one check of a report failed."""


class NumericalWarning(UserWarning):
    """The result is usable but rests on weak numerics; the message says what to do."""


class NoConceptWarning(UserWarning):
    """The data carries no linear trace of the concept, so the eraser changes nothing."""
