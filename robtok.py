"""The command `robtok`, outside the package: importing that takes seconds, which help and version do not need."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence


DESCRIPTION = "Make a frozen vision transformer robust to adversarial images by learning a few extra input tokens."

COMMANDS = {
    "train": "Train tokens on a base and save them as an adapter.",
    "attack": "Attack images once and store the pairs, to reuse them in many trainings.",
    "sweep": "Train many sets of tokens on the same attacked images and compare them.",
    "evaluate": "Attack an adapter at several levels of attacker knowledge and write a report.",
    "info": "Print what an adapter holds, without loading its base.",
    "import-tokens": "Convert tokens that the paper's authors released into an adapter.",
    "push": "Upload an adapter to the Hub in one commit, to a private repo by default.",
    "merge": "Merge tokens and base into a plain transformers or timm model with registers; it contains the tokens.",
}

# Their text alone is no sentence, so the class is named too.
_NAMED_ERRORS = (LookupError, TypeError, AttributeError, NameError, AssertionError)


def main(words: Sequence[str] | None = None) -> None:
    """Runs `robtok`. An error prints one line and exits with code 1; ROBTOK_DEBUG=1 shows the traceback instead."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] not in COMMANDS:
        _top_parser().parse_args(words or ["--help"])
        return
    try:
        from robustness_tokens.cli import run_command

        run_command(words[0], words[1:], COMMANDS[words[0]])
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as exc:
        if os.environ.get("ROBTOK_DEBUG", "0") != "0":
            raise
        text = str(exc)
        if isinstance(exc, _NAMED_ERRORS) or not text:
            text = f"{type(exc).__name__}: {text} (ROBTOK_DEBUG=1 shows where)"
        print(printable(" ".join(["robtok:", *text.split()])), file=sys.stderr)
        raise SystemExit(1) from exc


def printable(text: str) -> str:
    """Returns one line, in which nothing from a file, a folder's name or the Hub steers or deceives a reader.

    Line breaks, control characters, and characters that are invisible or turn the direction of a text are escaped.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _top_parser() -> argparse.ArgumentParser:
    """Returns a parser that knows the commands by name; `robustness_tokens.cli` knows their arguments."""
    parser = argparse.ArgumentParser(prog="robtok", description=DESCRIPTION, allow_abbrev=False)
    version = importlib.metadata.version("robustness-tokens")
    parser.add_argument("--version", action="version", version=version, help="Print the version.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, sentence in COMMANDS.items():
        commands.add_parser(name, help=sentence)
    parser.epilog = (
        "`robtok COMMAND --help` explains the arguments of a command. An error prints one line and exits with code 1; "
        "ROBTOK_DEBUG=1 shows the traceback."
    )
    return parser


if __name__ == "__main__":
    main()
