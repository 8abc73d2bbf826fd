"""Run the command line: `python -m draftune`."""

from draftune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
