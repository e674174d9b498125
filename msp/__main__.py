"""``python -m msp`` is ``msp``."""

from msp.cli import main

if __name__ == "__main__":
    main()
