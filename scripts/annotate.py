"""Launch `scgpt_hf.cli.annotate`; see `--help`."""

from scgpt_hf.cli.annotate import main

if __name__ == "__main__":
    main()
