"""`python -m transmla` is `transmla`."""

from transmla.cli import main

main()
