"""`python -m transmla` is the same as `transmla`."""

from transmla.cli import main

main()
