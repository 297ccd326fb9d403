"""`python -m robustness_tokens` is `robtok`."""

from robtok import main


main()
