"""``python -m moediag``: the command without its script."""

from moediag.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
