"""`python -m robustness_tokens` is `robtok`."""

from .cli import main


main()
