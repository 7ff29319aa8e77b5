"""What `align registry` does beyond looking: collecting garbage, importing, exporting, examining a file system."""
