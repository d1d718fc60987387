"""Work on many cells that is divided into shards, one file each, and done by any number of processes."""
