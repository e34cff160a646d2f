"""A package, not a namespace: opacus installs one of the same name, which would be found instead."""
