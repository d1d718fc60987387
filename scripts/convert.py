"""Launch `scgpt_hf.cli.convert`; see `--help`."""

from scgpt_hf.cli.convert import main

if __name__ == "__main__":
    main()
