"""``python -m lssl`` is ``lssl``."""

from lssl.cli.main import main

if __name__ == "__main__":
    main()
