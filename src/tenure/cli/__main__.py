"""``python -m tenure.cli``: the same as the ``tenure`` command."""

from tenure.cli.main import main

if __name__ == "__main__":
    main()
