"""`accelerate launch -m transmla.heal ...` runs `transmla heal ...` in several processes.

The Python call is `transmla.heal`.
"""

from transmla.cli import main

if __name__ == "__main__":
    import sys

    main(["heal", *sys.argv[1:]])
