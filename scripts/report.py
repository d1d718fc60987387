"""Launch `scgpt_hf.cli.report`; see `--help`."""

from scgpt_hf.cli.report import main

if __name__ == "__main__":
    main()
