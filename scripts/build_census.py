"""Launch `scgpt_hf.cli.build_census`; see `--help`."""

from scgpt_hf.cli.build_census import main

if __name__ == "__main__":
    main()
