"""Launch `scgpt_hf.cli.publish`; see `--help`."""

from scgpt_hf.cli.publish import main

if __name__ == "__main__":
    main()
