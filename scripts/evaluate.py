"""Launch `scgpt_hf.cli.evaluate`; see `--help`."""

from scgpt_hf.cli.evaluate import main

if __name__ == "__main__":
    main()
