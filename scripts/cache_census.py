"""Launch `scgpt_hf.cli.cache`; see `--help`."""

from scgpt_hf.cli.cache import main

if __name__ == "__main__":
    main()
