"""Launch `scgpt_hf.cli.check`; see `--help`."""

from scgpt_hf.cli.check import main

if __name__ == "__main__":
    main()
