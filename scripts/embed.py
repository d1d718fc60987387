"""Launch `scgpt_hf.cli.embed`; see `--help`."""

from scgpt_hf.cli.embed import main

if __name__ == "__main__":
    main()
