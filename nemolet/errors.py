"""Every exception a user can see.

A nemolet error always answers four questions: *where* did it happen, what was *expected*, what was
*found*, and what is the nearest *fix*. Code raises the subclass of its area and fills in as many of
the four as it knows; the text is laid out here, once.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class NemoletError(Exception):
    """Base of all errors raised by nemolet.

    Args:
        what: one sentence that says what is wrong.
        where: the place: a module and port, a config path, a file and line.
        expected: what would have been right.
        found: what was there instead.
        fix: what the reader should do next.

    Example:
        >>> print(NemoletError("width does not divide", where="model.heads", expected="a divisor of 128",
        ...                    found="7", fix="set model.heads=8"))
        model.heads: width does not divide
          expected  a divisor of 128
          found     7
          fix       set model.heads=8
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.found, self.fix = what, where, expected, found, fix
        lines = [f"{where}: {what}" if where else what]
        rows = (("expected", expected), ("found", found), ("fix", fix))
        for label, value in rows:
            if value is not None:
                lines.append(f"  {label:<9} " + str(value).replace("\n", "\n" + " " * 12))
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling, so that an error in a worker process reaches the parent whole."""
        return (_rebuild, (type(self), self.what, self.where, self.expected, self.found, self.fix))


def _rebuild(
    kind: type[NemoletError], what: str, where: str | None, expected: object, found: object, fix: str | None
) -> NemoletError:
    return kind(what, where=where, expected=expected, found=found, fix=fix)


class DeclarationError(NemoletError):
    """A type, port or parameter axis is declared wrongly."""


class WiringError(NemoletError):
    """Modules do not fit together; raised before any tensor exists."""


class ShapeError(NemoletError):
    """A real tensor contradicts its declared type, or a size is impossible."""


class ConfigError(NemoletError):
    """A config value is unknown, missing, of the wrong type, or impossible."""


class TokenizerError(NemoletError):
    """A tokenizer cannot be trained, loaded or used as asked."""


class DataError(NemoletError):
    """A data file is missing, empty, corrupt or does not fit the model."""


class ArchiveError(NemoletError):
    """A .nemolet file is refused; nothing of it was executed."""


class ConversionError(NemoletError):
    """A folder of Hugging Face cannot be read or written; nothing of it was executed."""


class GenerationError(NemoletError):
    """A generation or decoding request is impossible."""


class ParallelError(NemoletError):
    """A layout does not fit the model, or a mesh does not fit the world."""


class TrainingError(NemoletError):
    """Training cannot start, continue or resume as asked."""


class MissingPackageError(NemoletError):
    """A package that only some uses need is not installed."""


@contextlib.contextmanager
def needs(package: str, *, extra: str) -> Iterator[None]:
    """Where a package is imported that an extra of nemolet brings: if it is missing, say how to get it.

    Args:
        package: that is imported.
        extra: of nemolet, which brings it.

    Raises:
        MissingPackageError: where it is not installed.

    Example:
        >>> with needs("nothing_of_this_name", extra="speech"):
        ...     import nothing_of_this_name
        Traceback (most recent call last):
        ...
        nemolet.errors.MissingPackageError: the package nothing_of_this_name is missing
          expected  the packages of nemolet[speech]
          found     No module named 'nothing_of_this_name'
          fix       pip install "nemolet[speech]"
    """
    try:
        yield
    except ImportError as error:
        raise MissingPackageError(
            f"the package {package} is missing",
            expected=f"the packages of nemolet[{extra}]",
            found=str(error),
            fix=f'pip install "nemolet[{extra}]"',
        ) from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like a mistyped one, or None.

    Example:
        >>> nearest("widht", ["width", "layers"])
        'width'
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return the nearest known name as a fix to suggest, or None.

    Example:
        >>> did_you_mean("widht", ["width", "layers"])
        "did you mean 'width'?"
    """
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else None
