"""A complete small run that needs nothing but this package: `jtune quickstart`."""
