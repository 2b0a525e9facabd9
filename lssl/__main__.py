"""``python -m lssl`` is ``lssl``."""

from lssl.cli import main

if __name__ == "__main__":
    main()
