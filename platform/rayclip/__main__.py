"""`python -m rayclip COMMAND ...`, the same as `rayclip COMMAND ...`."""

from rayclip.cli.main import main

if __name__ == "__main__":
    main()
