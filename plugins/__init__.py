"""The built-in placement strategies, one file each. Written to be read by authors of their own."""
