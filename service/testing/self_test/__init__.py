"""The failure classes with the libraries as they are installed here, each tried once.

`run` has the table and `main`; the other modules have the reproductions, which tests/failures uses
too, and one function per class that says whether plain libraries still fail so and whether ours
notices.
"""
