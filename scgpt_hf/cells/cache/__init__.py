"""A cache of cells on disk, in Arrow files that can be read in any order: write it, read it, fetch it from the Hub."""
