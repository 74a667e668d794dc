"""The tests are a package, so that `tests.support` can be imported from every room."""
